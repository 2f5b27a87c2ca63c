"""Presigned URLs in Amazon's responses: their locations, hosts and lifetimes.

A presigned URL is its own credential (S3 user guide, "Download and upload objects with presigned URLs"): its holder can
read or write that one document until it expires. Every byte of it is signed, so it must be used unchanged.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, urlsplit


class UrlLocation(NamedTuple):
    """The location of URLs in an operation's response: a path of keys, `*` for each item of a list."""

    keys: tuple[str, ...]
    is_upload: bool = False


# From the models: the URLs of Amazon's storage. Other URLs in responses are not presigned: web pages (tracking links),
# or files on other hosts, such as the ZIP files of Amazon Custom.
URL_LOCATIONS: dict[str, UrlLocation] = {
    "awd.2024-05-09.getInboundShipmentLabels": UrlLocation(("labelDownloadURL",)),
    "dataKiosk.2023-11-15.getDocument": UrlLocation(("documentUrl",)),
    "easyShip.2022-03-23.createScheduledPackageBulk": UrlLocation(("printableDocumentsUrl",)),
    "feeds.2021-06-30.createFeedDocument": UrlLocation(("url",), is_upload=True),
    "feeds.2021-06-30.getFeedDocument": UrlLocation(("url",)),
    "fulfillmentInbound.2024-03-20.createMarketplaceItemLabels": UrlLocation(("documentDownloads", "*", "uri")),
    "fulfillmentInbound.2024-03-20.getDeliveryChallanDocument": UrlLocation(("documentDownload", "uri")),
    "fulfillmentInbound.v0.getBillOfLading": UrlLocation(("payload", "DownloadURL")),
    "fulfillmentInbound.v0.getLabels": UrlLocation(("payload", "DownloadURL")),
    "fulfillmentOutbound.2020-07-01.getFulfillmentOrder": UrlLocation(
        (
            *("payload", "fulfillmentShipments", "*", "fulfillmentShipmentPackage", "*"),
            *("deliveryInformation", "deliveryDocumentList", "*", "url"),
        )
    ),
    "invoices.2024-06-19.getGovernmentInvoiceDocument": UrlLocation(("invoiceDocument", "invoiceDocumentUrl")),
    "invoices.2024-06-19.getInvoicesDocument": UrlLocation(("invoicesDocument", "invoicesDocumentUrl")),
    "reports.2021-06-30.getReportDocument": UrlLocation(("url",)),
    "services.v1.createServiceDocumentUploadDestination": UrlLocation(("payload", "url"), is_upload=True),
    "uploads.2020-11-01.createUploadDestinationForResource": UrlLocation(("payload", "url"), is_upload=True),
}

# S3 hosts, with the bucket in the host or in the path. Amazon uses several forms:
# tortuga-prod-na.s3.amazonaws.com, tortuga-prod-na.s3-external-1.amazonaws.com,
# tortuga-prod-eu.s3-eu-west-1.amazonaws.com, s3.amazonaws.com (S3 user guide, "Virtual hosting of buckets").
_REGION = r"[a-z]{2}(?:-[a-z]{2,12}){1,3}-\d{1,2}"
# An exact list, because the proxy connects to these hosts: a URL in a response must not lead it anywhere else.
_S3 = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?\.)?"
    rf"(?:s3|s3-external-1|s3[.-]{_REGION}|s3\.dualstack\.{_REGION}|s3-accelerate(?:\.dualstack)?)\.amazonaws\.com"
)
# The host of the static sandbox's documents (models feeds_2021-06-30, reports_2021-06-30, dataKiosk_2023-11-15).
_SANDBOX = frozenset({"d34o8swod1owfl.cloudfront.net"})

DEFAULT_LIFETIME = 300.0  # seconds, for a URL without a lifetime (models feeds_2021-06-30, reports_2021-06-30)
# Checked before urlsplit, which silently removes tabs and line breaks (bpo-43882).
_URL = re.compile(r"https?://[!-~]+")  # no space, control or non-ASCII character
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')


def is_storage(host: str) -> bool:
    """Return whether a lower-case host is one of Amazon's document hosts."""
    return host in _SANDBOX or _S3.fullmatch(host) is not None


def parse(url: str) -> SplitResult | None:
    """Return the parts of a URL that can be forwarded unchanged, None for every other one."""
    # A fragment is never sent (RFC 9110 section 7.1). Browsers read `\` as `/` (WHATWG URL), urlsplit does not: the two
    # would see different hosts.
    if not _URL.fullmatch(url) or "#" in url or "\\" in url:
        return None
    try:
        parts = urlsplit(url)
        # `.port` raises ValueError for a port that is no number or above 65535; 0 it accepts.
        is_plain = bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        return None
    return parts if is_plain else None


def lifetime(query: str, now: float) -> float:
    """Return the remaining lifetime, in seconds from `now` (Unix time), of a presigned URL that was just created.

    `X-Amz-Expires` is a number of seconds (signature version 4), `Expires` Unix time (version 2, CloudFront).
    """
    # Invoice documents live only 30 seconds (model InvoicesApiModel_2024-06-19): the default would be far too long.
    given = {name.lower(): value for name, value in parse_qsl(query)}
    for name, since in (("x-amz-expires", 0.0), ("expires", now)):
        text = given.get(name, "")
        # isascii: isdigit also accepts characters that float() rejects, such as `²`.
        if text.isascii() and text.isdigit() and len(text) <= 12:
            return max(0.0, float(text) - since)
    return DEFAULT_LIFETIME


def signed_headers(query: str) -> frozenset[str]:
    """Return the names, in lower case, of the header fields that a presigned URL's signature covers."""
    names = next((value for name, value in parse_qsl(query) if name.lower() == "x-amz-signedheaders"), "")
    return frozenset(names.lower().split(";")) - {""}


def urls_in(content: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """Yield the URLs at a location of a response; nothing where it does not have the form of the model."""
    if not keys:
        if isinstance(content, str):
            yield content
    elif keys[0] != "*":
        if isinstance(content, Mapping):
            yield from urls_in(content.get(keys[0]), keys[1:])
    elif isinstance(content, list):
        for one in content:
            yield from urls_in(one, keys[1:])


def literals_in(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of each string in a JSON text, quotes included."""
    # Only for text that json.loads accepts: on a string that never ends this is quadratic (16,000 escaped quotes: 3 s).
    for match in _STRING.finditer(body):
        yield match.span()
