"""Whatever headers an app sends: what goes on is its own, in order, and nothing that is ours to set or to keep."""

import string

from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.errors import MalformedRequest
from proxy.request.upstream.request_headers import BODY_FIELDS, STRIPPED_HEADERS, STRIPPED_PREFIXES, end_to_end_headers
from proxy.request.upstream.response import HOP_BY_HOP

TOKEN = st.text(st.sampled_from(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~"), min_size=1, max_size=20)
KNOWN = st.sampled_from(
    sorted(
        {
            *STRIPPED_HEADERS,
            *HOP_BY_HOP,
            *BODY_FIELDS,
            "x-sp-account",
            "x-sp-key",
            "x-forwarded-for",
            "x-mine",
            "accept",
        }
    )
)


@st.composite
def spelt(draw: st.DrawFn) -> str:
    """A known name in some case, with `_` for some of its `-`."""
    name = "".join(draw(st.sampled_from([c, c.upper(), "_" if c == "-" else c])) for c in draw(KNOWN))
    return draw(st.sampled_from([name, f"x-{name}", f"{name}-x"]))


NAMES = st.one_of(TOKEN, spelt())
VALUES = st.one_of(
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x2FFF, exclude_characters="\x7f"), max_size=20),
    st.sampled_from(["close", "x-mine", "X_Mine, accept", "Content-Length, x-amz-access-token", "\udcff"]),
)
FIELDS = st.lists(st.tuples(st.one_of(NAMES, st.just("Connection")), VALUES), max_size=12)


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


@given(st.sampled_from(["GET", "POST"]), FIELDS)
@example("POST", [("x_amz_access_token", "x"), ("Connection", "X-Mine"), ("x_mine", "1")])
def test_what_goes_on_is_the_apps_own(method: str, fields: list[tuple[str, str]]) -> None:
    sent = CIMultiDictProxy(CIMultiDict(fields))
    try:
        kept = list(end_to_end_headers(method, sent).items())
    except MalformedRequest:
        assert any("\udcff" in value for _, value in fields)
        return
    named = {plain(part.strip()) for name, value in fields if plain(name) == "connection" for part in value.split(",")}
    for name, _ in kept:
        assert plain(name) not in STRIPPED_HEADERS | HOP_BY_HOP | named
        assert not plain(name).startswith(STRIPPED_PREFIXES)
        assert method == "POST" or plain(name) not in BODY_FIELDS
        assert plain(name) not in BODY_FIELDS or "_" not in name
    rest = iter(fields)
    assert all(field in rest for field in kept), "in the order in which they were sent, and unchanged"


@given(st.lists(st.tuples(TOKEN.filter(lambda name: "_" not in name), st.text("abc ,=;", max_size=9)), max_size=9))
def test_what_is_nobody_elses_goes_on_whole(fields: list[tuple[str, str]]) -> None:
    own = [
        (name, value)
        for name, value in fields
        if plain(name) not in STRIPPED_HEADERS | HOP_BY_HOP | BODY_FIELDS
        and not plain(name).startswith(STRIPPED_PREFIXES)
    ]
    assert list(end_to_end_headers("POST", CIMultiDictProxy(CIMultiDict(own))).items()) == own
