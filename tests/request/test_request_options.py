"""Options of one call in its headers."""

import pytest

from proxy.errors import BadOption
from proxy.request.request_options import parse_max_wait


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 10.0),
        ("0", 0.0),
        ("0s", 0.0),
        ("500ms", 0.5),
        ("2m", 120.0),
        ("30", 30.0),
        ("1.5s", 1.5),
        (" 3s ", 3.0),
        ("1h", 3600.0),
        ("2h", 3600.0),
        ("1d", 3600.0),
    ],
)
def test_a_caller_says_how_long_a_call_may_wait_and_an_hour_is_the_longest(text: str | None, seconds: float) -> None:
    assert parse_max_wait(text, 10.0) == seconds


@pytest.mark.parametrize(
    "text", ["", "-1s", "soon", "NaN", "inf", "1e3", "1 s", "10s, 10s", "9" * 5000, "400d", "٣s", "\x00"]
)
def test_a_wait_that_means_nothing_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(BadOption) as caught:
        parse_max_wait(text, 10.0)
    assert "x-sp-max-wait" in caught.value.message
    assert "500ms" in caught.value.hint
    assert not text or text not in caught.value.message
