"""Test corpora of other projects' HTTP parsers, with the result that each project expects.

Both corpora are unmodified, each beside its licence; only this file knows their formats.

- `corpora/gunicorn` is `tests/requests` of gunicorn 27.0.1 without the Python beside each file: what it rejects
  (`invalid`) and what it accepts (`valid`), some only with a setting.
- `corpora/llhttp` is `test/request` and `test/response` of llhttp 9.4.2, the HTTP parser of Node and aiohttp: each
  message has the log of the parser's callbacks. Its lenient modes are left out.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent / "corpora"

_META = re.compile(r"<!--\s*meta=(\{.*?\})\s*-->")
_BLOCK = re.compile(r"^```(http|log)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{2,} +(.+)$", re.MULTILINE)
_STRICT = {"request", "request-finish", "response", "response-finish"}

_SPAN = re.compile(r'span\[(\w+)\]=(?:"(.*)"|(cr|lf))$')
_HEAD = re.compile(r"headers complete (?:status=(\d+) |method=\d+ )?v=\d/\d flags=([0-9a-f]+)")
_NO_MISTAKE = {21, 22, 23}  # the parser pauses: on request, or before another protocol
_CHUNKED, _LENGTH = 0x8, 0x20  # llhttp's flags of a message with explicit framing


@dataclass(slots=True)
class Message:
    """One message as llhttp reads it; `is_framed`: its head, not the end of the connection, determines its end."""

    method: str = ""
    url: str = ""
    body: bytes = b""
    status: int = 0
    has_head: bool = False
    is_framed: bool = False
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One entry of a corpus: its bytes, whether its project rejects them, and the messages that the project reports."""

    name: str
    data: bytes
    is_rejected: bool
    messages: list[Message] = field(default_factory=list)


def gunicorn(folder: str) -> list[Case]:
    r"""Return the requests of `invalid` or `valid`: line ends are written `\r\n`, those of the file are ignored."""
    paths = sorted((ROOT / "gunicorn" / folder).glob("*.http"))
    return [Case(f"{folder}/{path.stem}", _spelt_out(path.read_bytes()), folder == "invalid") for path in paths]


def _spelt_out(text: bytes) -> bytes:
    # In the order of gunicorn's tests/treq.py.
    data = text.replace(b"\n", b"").replace(b"\\r\\n", b"\r\n")
    data = data.replace(b"\\0", b"\0").replace(b"\\n", b"\n").replace(b"\\t", b"\t")
    return re.sub(rb"\\x([0-9a-fA-F]{2})", lambda match: bytes.fromhex(match[1].decode()), data)


def llhttp(folder: str) -> list[Case]:
    """Return the strict cases of `request` or `response`, each named after its file and its heading.

    Cases that test callbacks of llhttp's user are left out, such as a callback that skips the body.
    """
    return [case for path in sorted((ROOT / "llhttp" / folder).glob("*.md")) for case in _cases_of(path)]


def _cases_of(path: Path) -> list[Case]:
    text = path.read_text(encoding="utf-8")
    cases: dict[str, Case] = {}
    blocks = list(_BLOCK.finditer(text))
    for (before, http), log in zip(pairwise([None, *blocks]), blocks[1:], strict=False):
        assert http is not None
        if (http[1], log[1]) != ("http", "log"):
            continue
        between = text[before.end() if before else 0 : http.start()]
        meta = json.loads(_META.findall(between)[-1])
        if meta["type"] not in _STRICT or "skipBody" in meta:
            continue
        title = _HEADING.findall(between)[-1]
        name = f"{path.parent.name}/{path.stem}/" + "-".join(re.findall(r"[a-z0-9.]+", title.lower()))
        while name in cases:
            name += "-again"
        messages, is_rejected = _as_read(log[2])
        cases[name] = Case(name, _unescaped(http[2]), is_rejected, messages)
    return list(cases.values())


def _unescaped(text: str) -> bytes:
    # In the order of llhttp's test/md-test.ts.
    text = text.removesuffix("\n")
    text = text.replace("\\\n", "").replace("\n", "\r\n")
    for escape, character in (("\\r", "\r"), ("\\n", "\n"), ("\\t", "\t"), ("\\f", "\f")):
        text = text.replace(escape, character)
    text = re.sub(r"\\x([0-9a-fA-F]+)", lambda match: chr(int(match[1], 16)), text)
    return re.sub(r"\\([0-7]{1,3})", lambda match: chr(int(match[1], 8)), text).encode()


def _as_read(log: str) -> tuple[list[Message], bool]:
    """Return the messages in a log, and whether the parser found an error."""
    messages: list[Message] = []
    for line in log.splitlines():
        if line.endswith("message begin"):
            messages.append(Message())
        elif span := _SPAN.search(line):
            _take_span(messages[-1], span)
        elif head := _HEAD.search(line):
            messages[-1].status, messages[-1].has_head = int(head[1] or 0), True
            messages[-1].is_framed = bool(int(head[2], 16) & (_CHUNKED | _LENGTH))
        elif line.endswith("message complete"):
            messages[-1].is_whole = True
        elif error := re.search(r"error code=(\d+)", line):
            return messages, int(error[1]) not in _NO_MISTAKE
    return messages, False


def _take_span(message: Message, span: re.Match[str]) -> None:
    if span[1] == "body":
        message.body += {"cr": b"\r", "lf": b"\n"}[span[3]] if span[3] else span[2].encode()
    elif span[1] == "method":
        message.method += span[2]
    elif span[1] == "url":
        message.url += span[2]
