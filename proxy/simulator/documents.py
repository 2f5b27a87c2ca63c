"""The simulator's document storage with presigned URLs, as in S3.

Documents are below `/_documents` on the token host's port. A URL is valid for one method, five minutes, and the content
type that it was created for; further credentials are rejected, as S3 rejects two authentication methods.
"""

import gzip
import hmac
import json
import secrets
from calendar import timegm
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import gmtime, strftime, strptime
from typing import Any
from urllib.parse import parse_qs, quote, unquote
from xml.sax.saxutils import escape

from proxy.simulator.responses import Response

PATH = "/_documents"
LIFETIME = 300  # seconds
MAX_KEPT = 100  # documents: the newest
_DATE = "%Y%m%dT%H%M%SZ"
# The paths of documents, with the field of the answer that says which one it is.
_DOWNLOADS = {
    "/feeds/2021-06-30/documents": "feedDocumentId",
    "/reports/2021-06-30/documents": "reportDocumentId",
    "/dataKiosk/2023-11-15/documents": "documentId",
}
_REPORT = "sku\tquantity\n" + "".join(f"sku-{number}\t{number}\n" for number in range(1000))


@dataclass(slots=True)
class Documents:
    """The documents of one simulator; `base` is the URL that they are below."""

    base: str = ""
    stored: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # content type and content
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def put(self, name: str, content_type: str, content: bytes) -> None:
        """Keep a document."""
        self.stored[name] = content_type, content
        while len(self.stored) > MAX_KEPT:
            del self.stored[next(iter(self.stored))]

    def report(self, name: str) -> None:
        """Make a packed report of this name, where there is none yet."""
        if name not in self.stored:
            self.put(name, "text/plain; charset=utf-8", gzip.compress(_REPORT.encode(), mtime=0))

    def presigned(self, method: str, name: str, now: float, content_type: str = "") -> str:
        """Return a URL for one method and document; `now` in Unix time."""
        path = f"{PATH}/{quote(name, safe='')}"
        date = strftime(_DATE, gmtime(now))
        pairs = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Date": date,
            "X-Amz-SignedHeaders": "content-type%3Bhost" if content_type else "host",
            "X-Amz-Expires": str(LIFETIME),
            "X-Amz-Credential": f"SIMULATED%2F{date[:8]}%2Fus-east-1%2Fs3%2Faws4_request",
        }
        query = "&".join(f"{key}={value}" for key, value in pairs.items())
        return f"{self.base}{path}?{query}&X-Amz-Signature={self._signature(method, path, query, content_type)}"

    def respond(self, method: str, target: str, headers: Mapping[str, str], body: bytes, now: float) -> Response:
        """Answer a request for a document; `headers` by lower-case name, `now` in Unix time."""
        path, _, query = target.partition("?")
        signed, _, signature = query.partition("&X-Amz-Signature=")
        said = {key: values[0] for key, values in parse_qs(signed).items()}
        content_type = headers.get("content-type", "") if "content-type" in said.get("X-Amz-SignedHeaders", "") else ""
        if {"authorization", "cookie", "x-amz-access-token", "x-sp-key"} & headers.keys():
            return _refused(400, "InvalidArgument", "Only one auth mechanism allowed")
        if not hmac.compare_digest(signature.encode(), self._signature(method, path, signed, content_type).encode()):
            return _refused(403, "SignatureDoesNotMatch", "The signature we calculated does not match")
        if now >= timegm(strptime(said["X-Amz-Date"], _DATE)) + int(said["X-Amz-Expires"]):
            return _refused(403, "AccessDenied", "Request has expired")
        name = unquote(path.removeprefix(f"{PATH}/"))
        if method == "PUT":
            self.put(name, headers.get("content-type", "binary/octet-stream"), body)
            return Response(200, b"", {})
        if name not in self.stored:
            return _refused(404, "NoSuchKey", "The specified key does not exist.")
        return _part(*self.stored[name], headers.get("range", ""))

    def call(self, method: str, path: str, body: bytes, now: float) -> tuple[int, Any] | None:
        """Return the answer to a call of the API that names a document, None for every other call."""
        if (method, path) == ("POST", "/feeds/2021-06-30/documents"):
            name = f"amzn1.tortuga.4.eu.{secrets.token_hex(8)}"
            return 201, {"feedDocumentId": name, "url": self.presigned("PUT", name, now, _content_type(body))}
        if method == "POST" and path.startswith("/uploads/2020-11-01/uploadDestinations/"):
            name = f"upload-{secrets.token_hex(8)}"
            url = self.presigned("PUT", name, now)
            return 201, {"payload": {"uploadDestinationId": name, "url": url, "headers": {}}}
        folder, _, name = path.rpartition("/")
        name = unquote(name)
        if method != "GET" or not name or folder not in _DOWNLOADS:
            return None
        if folder != "/feeds/2021-06-30/documents":
            self.report(name)
        url = self.presigned("GET", name, now)
        if folder.startswith("/dataKiosk"):
            return 200, {"documentId": name, "documentUrl": url}
        packed = {"compressionAlgorithm": "GZIP"} if self.stored.get(name, ("", b""))[1][:2] == b"\x1f\x8b" else {}
        return 200, {_DOWNLOADS[folder]: name, "url": url, **packed}

    def _signature(self, *parts: str) -> str:
        return hmac.digest(self._key, "\n".join(parts).encode(), "sha256").hex()


def _content_type(body: bytes) -> str:
    """Return the content type that createFeedDocument names, nothing where it names none."""
    try:
        wanted = json.loads(body)
    except ValueError:
        return ""
    return str(wanted.get("contentType") or "") if isinstance(wanted, dict) else ""


def _part(content_type: str, content: bytes, wanted: str) -> Response:
    """Return a document, or the bytes of it that `Range: bytes=FIRST-LAST` wants."""
    headers = {"Content-Type": content_type, "Accept-Ranges": "bytes"}
    first, dash, last = wanted.removeprefix("bytes=").partition("-")
    if not dash or not first.isdigit() or not last.isdigit():
        return Response(200, content, headers)
    part = content[int(first) : int(last) + 1]
    headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
    return Response(206, part, headers)


def _refused(status: int, code: str, message: str) -> Response:
    text = f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message></Error>"
    return Response(
        status, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(), {"Content-Type": "application/xml"}
    )
