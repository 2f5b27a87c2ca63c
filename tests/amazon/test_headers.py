"""The headers that Amazon wants on every call, escaped and dated as its documents say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.amazon.headers import MAX_USER_AGENT, amz_date, credential_headers, user_agent
from proxy.config import Application, Secret
from proxy.config.model import UserAgent

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("My Tool", "2.0", "Python/3.12", "Linux/6"), "My Tool/2.0 (Language=Python/3.12; Platform=Linux/6)"),
        (("a/b", "1", "L", "P"), r"a\/b/1 (Language=L; Platform=P)"),
        (("a", "1(beta)", "L", "P"), r"a/1\(beta) (Language=L; Platform=P)"),
        (("a", "1", "L;x)", "P(1)"), r"a/1 (Language=L\;x\); Platform=P(1\))"),
        (("a\\b", "1\\2", "L\\", "P\\"), "a\\\\b/1\\\\2 (Language=L\\\\; Platform=P\\\\)"),
        (("a(b);c=d", "1/2);=", "L/(=", "P/(="), r"a(b);c=d/1/2);= (Language=L/(=; Platform=P/(=)"),
        (("\\/", "\\(", "\\)", "\\;"), "\\\\\\//\\\\\\( (Language=\\\\\\); Platform=\\\\\\;)"),
    ],
)
def test_the_user_agent_is_escaped_as_amazon_documents_it(parts: tuple[str, str, str, str], expected: str) -> None:
    assert user_agent(*parts) == expected


def parsed(text: str) -> tuple[str, str, dict[str, str]]:
    """Return name, version and attributes of a user agent, read by Amazon's rules: a backslash hides what follows."""
    parts, part, escaped = [], "", False
    marks = iter(("/", "(", ";", ")"))
    mark = next(marks)
    for character in text:
        if not escaped and character == "\\":
            escaped = True
        elif not escaped and character == mark:
            parts.append(part)
            part, mark = "", next(marks, "")
        else:
            part, escaped = part + character, False
    assert part == ""
    name, version, *attributes = parts
    pairs = (attribute.removeprefix(" ").partition("=") for attribute in attributes)
    return name, version.removesuffix(" "), {key: value for key, _, value in pairs}


@given(PRINTABLE, PRINTABLE, PRINTABLE, PRINTABLE)
def test_a_reader_who_knows_the_escapes_gets_every_part_back(
    name: str, version: str, language: str, system: str
) -> None:
    text = user_agent(name[:40], version[:40], language[:40], system[:40])
    assert parsed(text) == (name[:40], version[:40], {"Language": language[:40], "Platform": system[:40]})


def test_language_and_platform_are_those_of_this_process_where_left_out() -> None:
    assert re.fullmatch(r"a/1 \(Language=Python/3\.\d+\.\d+\S*; Platform=\w+/.+\)", user_agent("a", "1"))


def test_the_largest_configured_values_fit_even_if_every_character_is_escaped() -> None:
    limits = {
        name: next(meta.max_length for meta in field.metadata if hasattr(meta, "max_length"))
        for name, field in UserAgent.model_fields.items()
        if any(hasattr(meta, "max_length") for meta in field.metadata)
    }
    length = {"language": 40, "platform": 40, **limits}
    UserAgent(**{name: "\\" * size for name, size in length.items()})  # the configuration takes them
    text = user_agent(*("\\" * length[name] for name in ("name", "version", "language", "platform")))
    assert len(text) <= MAX_USER_AGENT


@pytest.mark.parametrize("part", ["name", "version", "language", "platform"])
def test_the_configuration_takes_no_longer_value_than_the_largest(part: str) -> None:
    longest = max(size for size in range(1, 200) if _is_taken(part, "x" * size))
    assert longest == (100 if part == "name" else 40)


def _is_taken(part: str, text: str) -> bool:
    try:
        UserAgent(**{part: text})
    except ValueError:
        return False
    return True


def test_the_defaults_of_an_application_make_a_user_agent() -> None:
    defaults = Application(client_id="x", client_secret=Secret("x")).user_agent
    assert user_agent(defaults.name, defaults.version).startswith("sp-api-proxy/")


def test_a_user_agent_of_500_characters_is_taken_and_one_more_is_not() -> None:
    rest = len(user_agent("", "1", "L", "P"))
    assert len(user_agent("x" * (500 - rest), "1", "L", "P")) == 500
    with pytest.raises(ValueError, match="is 501 characters long; Amazon accepts 500"):
        user_agent("x" * (501 - rest), "1", "L", "P")


@pytest.mark.parametrize("text", ["a\r\nx: y", "a\nb", "ä", "a\x00", "a\x7f", "a\tb"])
@pytest.mark.parametrize("place", range(4))
def test_what_no_header_may_hold_is_refused(text: str, place: int) -> None:
    parts = ["a", "1", "L", "P"]
    parts[place] = text
    with pytest.raises(ValueError, match="printable ASCII"):
        user_agent(*parts)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, "19700101T000000Z"),
        (1556627760, "20190430T123600Z"),
        (1556627760.999, "20190430T123600Z"),
        (951782400, "20000229T000000Z"),
        (4102444799, "20991231T235959Z"),
    ],
)
def test_the_date_is_utc_in_the_short_form_of_iso_8601(epoch: float, expected: str) -> None:
    assert amz_date(epoch) == expected


def test_a_call_is_authenticated_by_token_date_and_user_agent() -> None:
    assert credential_headers(Secret("Atza|x"), "agent", 0) == {
        "x-amz-access-token": "Atza|x",
        "x-amz-date": "19700101T000000Z",
        "user-agent": "agent",
    }
