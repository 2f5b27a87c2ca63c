"""A token that an answer repeats: masked wherever the pieces end, and nothing else touched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.request.token import secret_suffix
from proxy.request.upstream.token_redaction import TokenRedactor

TOKEN = "Atza|AbAbAcAbAbAbAcAbAd"
TEXT = TOKEN.partition("|")[2].encode()


def passed(mask: TokenRedactor, pieces: list[bytes]) -> bytes:
    return b"".join([*(mask.feed(chunk) for chunk in pieces), mask.end()])


@given(st.lists(st.sampled_from([TEXT, TEXT[:-1], TEXT[:5], b"A", b"Ab", b"Atza|", b"x", b""]), max_size=12), st.data())
def test_however_it_is_cut_all_but_the_token_passes(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    chunks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    redactor = TokenRedactor(secret_suffix(TOKEN))
    got = passed(redactor, chunks)
    assert got == whole.replace(TEXT, b"*" * len(TEXT))
    assert redactor.matched is (TEXT in whole)


def test_nothing_of_a_token_leaves_before_it_is_known_to_be_none() -> None:
    redactor = TokenRedactor(secret_suffix(TOKEN))
    assert redactor.feed(b"said: " + TEXT[:-1]) == b"said: "
    assert redactor.feed(TEXT[-1:]) == b"*" * len(TEXT)
    assert redactor.end() == b""


def test_an_ordinary_body_is_passed_on_as_the_object_it_is() -> None:
    body = b'{"payload": [1, 2, 3]}'
    assert TokenRedactor(secret_suffix(TOKEN)).feed(body) is body


@pytest.mark.parametrize("token", ["Atza|short", "no-prefix-at-all", "Atza|" + "x" * 16, "a|b|" + "y" * 20])
def test_short_tokens_are_masked_whole_and_long_ones_without_their_prefix(token: str) -> None:
    redactor = TokenRedactor(secret_suffix(token))
    text = redactor.redact(f"before {token} after".encode()).decode()
    assert token not in text
    assert len(text) == len(f"before {token} after")
    assert text.startswith("before ")
