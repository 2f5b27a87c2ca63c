"""Is one of the proxy's own headers misspelt?

An `x-sp-…` header that nobody knows is dropped before Amazon, as all of them are. Where it is near to one that counts,
to drop it would serve the request as if nothing had been asked: by the default account, perhaps another seller's.
"""

import difflib
from collections.abc import Iterable
from itertools import islice

from proxy.errors import BadOption

PREFIX = "x-sp-"
# What an app may send, without the prefix; the modules that read them name them in full.
REQUEST_HEADERS = ("account", "region", "data-elements", "key", "max-wait", "priority", "client", "timeout", "retry")
# What an answer of the proxy's may hold: who sends it on means nothing by it.
RESPONSE_HEADERS = frozenset({"x-sp-proxy", "x-sp-proxy-error"})

_KNOWN = RESPONSE_HEADERS | {PREFIX + name for name in REQUEST_HEADERS}
_NEAR = 0.65  # difflib's ratio: `acount` and `retries` are, `session` is not near to `region`
_MOST, _LONGEST = 16, 32  # names that are looked at in one request, and characters of each


def reject_unknown_headers(names: Iterable[str]) -> None:
    """Raise BadOption for a name that is near to one of the proxy's own; `names` are in lower case."""
    # What is written with `_` is another name, and not for everybody.
    strange = (name for name in names if name[:2] == "x-" or name[:2] == "x_")
    ours = (name for name in strange if name not in _KNOWN and name.replace("_", "-").startswith(PREFIX))
    for name in islice(ours, _MOST):
        rest = name[len(PREFIX) :].replace("_", "-")
        near = difflib.get_close_matches(rest, REQUEST_HEADERS, n=1, cutoff=_NEAR) if len(rest) <= _LONGEST else []
        if near:
            raise BadOption(
                f"the header {name} means nothing to the proxy; did you mean {PREFIX}{near[0]}?",
                f"Send {PREFIX}{near[0]}, or leave it out: nothing that may name another account is passed over.",
            )
