"""Addresses of relayed documents: what one stands for, and how it is encrypted (`documents: relay`).

A presigned URL of Amazon's becomes a path on the proxy that holds the encrypted URL. Only this proxy and replicas with
the same key can decrypt it; it is bound to account, caller and method, and expires no later than the URL.
"""

import json
from typing import NamedTuple
from urllib.parse import urlsplit

from proxy.amazon.presigned_urls import is_storage
from proxy.config import Config
from proxy.errors import DocumentRefused
from proxy.store.encryption import DecryptionFailed, DocumentCipher

INVALID_ADDRESS = "the document's address was not issued by this proxy for this account, or it was changed"
REQUEST_AGAIN = "Ask Amazon for the document again, and use the address in that response whole and unchanged."


class Document(NamedTuple):
    """What an address stands for: a URL, the caller it was issued to, and the call in whose response it was.

    `elements` is the personal data that may be in the document. `expires_at` is Unix time.
    """

    url: str
    is_upload: bool
    caller: str
    region: str
    method: str  # of the call, and the template of its path
    template: str
    elements: tuple[str, ...]
    expires_at: float


class DocumentAddresses:
    """Issues and reads the paths of documents, and knows which hosts documents may come from."""

    def __init__(self, config: Config, cipher: DocumentCipher) -> None:
        self._cipher = cipher
        endpoint = config.endpoints.documents
        self._endpoint = (urlsplit(endpoint).scheme, urlsplit(endpoint).netloc.lower()) if endpoint else None

    def path_of(self, account: str, document: Document) -> str:
        """Return the path that stands for a document of this account."""
        return f"/@{account}/-/documents/{self._cipher.encrypt(account, json.dumps(document).encode())}"

    def document_in(self, account: str, token: str) -> Document:
        """Return the document behind the encrypted part of a path; raise DocumentRefused where it is not valid."""
        try:
            document = Document(*json.loads(self._cipher.decrypt(account, token)))
        except (DecryptionFailed, ValueError, TypeError):
            raise DocumentRefused(INVALID_ADDRESS, REQUEST_AGAIN) from None
        return document

    def is_allowed_host(self, scheme: str, netloc: str) -> bool:
        """Return whether documents may come from there: Amazon's storage, or `endpoints.documents`."""
        host, colon, port = netloc.lower().partition(":")
        return (scheme, netloc.lower()) == self._endpoint or (
            scheme == "https" and is_storage(host) and (not colon or port == "443")
        )
