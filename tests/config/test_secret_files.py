"""Secret files: reading, reading again, permissions, and files that cannot be used."""

from pathlib import Path

import pytest

from proxy.config import (
    KeyPath,
    Secret,
    load_config,
)
from tests.config.loading import BASE, load, origins, problems


def test_set_reads_the_file_that_a_value_names(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file\n")
    path: KeyPath = ("applications", "main", "client_secret")
    loaded = load(tmp_path, BASE, {}, {path: f"{{file: {tmp_path}/secret}}"})
    assert loaded.config.applications["main"].client_secret.reveal() == "from-file"
    assert origins(loaded, tmp_path)[".".join(map(str, path))].startswith("--set, from file")
    assert Path(tmp_path / "secret") in loaded.files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"Atzr|x", "Atzr|x"),
        (b"Atzr|x\n", "Atzr|x"),
        (b"\n  Atzr|x\r\n\r\n", "Atzr|x"),
        (b"${HOME} $$", "${HOME} $$"),
        ("tür".encode(), "tür"),
        (b"\xef\xbb\xbfAtzr|x\r\n", "Atzr|x"),  # Windows editors put a mark before UTF-8 text
    ],
)
def test_a_file_gives_its_text_without_the_white_space_around_it(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "secret").write_bytes(content)
    config = load(tmp_path, BASE.replace("token-eu", "{file: secret}")).config
    assert config.accounts["acme"].refresh_tokens["eu"].reveal() == expected


def test_a_file_is_looked_for_beside_the_configuration_and_may_be_named_by_a_variable(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "eu").write_text("beside")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "na").write_text("absolute")
    tokens = f"{{eu: {{file: 'secrets/${{NAME}}'}}, na: {{file: '{elsewhere}/na'}}}}"
    config = load(tmp_path, BASE.replace("{eu: token-eu}", tokens), {"NAME": "eu"}).config
    assert config.accounts["acme"].refresh_tokens == {"eu": Secret("beside"), "na": Secret("absolute")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"x" * 65537, "is larger than 64 KiB"),
    ],
)
def test_a_file_that_cannot_serve_is_a_problem_that_names_key_and_file(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    (found,) = problems(tmp_path, BASE.replace("token-eu", "{file: secret}"))
    assert found.startswith("config.yaml:2: accounts.acme.refresh_tokens.eu: file secret")
    assert found.endswith(message)


def test_a_folder_in_place_of_a_file_is_a_problem(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, BASE.replace("token-eu", '{file: ""}'))
    assert found.endswith("Is a directory")


def test_a_file_name_that_no_file_can_have_is_a_problem(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, BASE.replace("token-eu", '{file: "a\\0b"}'))
    assert found.startswith("config.yaml:2: accounts.acme.refresh_tokens.eu: ")


@pytest.mark.parametrize("written", ["{file: }", "{file: [a]}", "{file: a, mode: b}", "{}", "{path: a}"])
def test_another_mapping_is_no_value(tmp_path: Path, written: str) -> None:
    (tmp_path / "a").write_text("x")
    assert any(
        "accounts.acme.refresh_tokens.eu" in line for line in problems(tmp_path, BASE.replace("token-eu", written))
    )


def test_a_secret_of_a_variable_or_a_file_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "refresh").write_text("old-refresh")
    environ = {"SECRET": "old-secret", "SP_API_PROXY_ACCOUNTS_ACME_REFRESH_TOKENS_NA": "old-na"}
    path = tmp_path / "config.yaml"
    path.write_text(
        "applications: {main: {client_id: c, client_secret: '${SECRET}'}}\n"
        "accounts: {acme: {refresh_tokens: {eu: {file: refresh}}}}\n"
    )
    config = load_config(str(path), environ).config
    secret = config.applications["main"].client_secret
    tokens = config.accounts["acme"].refresh_tokens
    assert [one.refreshed() for one in (secret, tokens["eu"], tokens["na"])] == [secret, tokens["eu"], tokens["na"]]
    environ |= {"SECRET": "new-secret", "SP_API_PROXY_ACCOUNTS_ACME_REFRESH_TOKENS_NA": "new-na"}
    (tmp_path / "refresh").write_text(" new-refresh \n")
    found = [one.refreshed().reveal() for one in (secret, tokens["eu"], tokens["na"])]
    assert found == ["new-secret", "new-refresh", "new-na"]
    assert secret.refreshed().refreshed().reveal() == "new-secret"
    environ.clear()
    (tmp_path / "refresh").write_bytes(b"\xff")
    assert [one.refreshed() for one in (secret, tokens["eu"], tokens["na"])] == [secret, tokens["eu"], tokens["na"]]


def test_the_key_of_a_listeners_certificate_is_a_secret_too(tmp_path: Path) -> None:
    key = tmp_path / "tls.key"
    key.write_text("key")
    key.chmod(0o644)
    text = f"{BASE}listen: {{address: '127.0.0.1:1', tls: {{certificate: c, key: '{key}'}}}}\n"
    assert any(problem.key == "listen[0].tls.key" for problem in load(tmp_path, text).warnings)
