"""Certificate of the upstream, and the certificate authority that the proxies trust for it.

Created for each run with the `openssl` program and deleted with its folder.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_LEAF = "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n"
_AUTHORITY = (
    *("-addext", "basicConstraints=critical,CA:TRUE,pathlen:0"),
    *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
)
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files: the trusted authority, and the upstream's certificate for `localhost` with its key."""

    authority: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    """Write an authority and a certificate for `localhost` (ECDSA P-256, valid for one day) into `folder`."""
    if shutil.which("openssl") is None:
        raise SystemExit("The benchmark makes its certificates with the openssl program: install the package openssl.")
    authority, authority_key = folder / "authority.pem", folder / "authority.key"
    certificate, key = folder / "upstream.pem", folder / "upstream.key"
    request, extensions = folder / "upstream.csr", folder / "upstream.ext"
    extensions.write_text(_LEAF)
    subject = ("-subj", "/CN=sp-api-proxy benchmark authority")
    _openssl(
        "req", "-x509", *_NEW_KEY, "-keyout", authority_key, "-out", authority, "-days", "1", *subject, *_AUTHORITY
    )
    _openssl("req", *_NEW_KEY, "-keyout", key, "-out", request, "-subj", "/CN=localhost")
    signed_by = ("-CA", authority, "-CAkey", authority_key, "-set_serial", "1")
    _openssl("x509", "-req", "-in", request, "-out", certificate, "-days", "1", *signed_by, "-extfile", extensions)
    return Certificates(authority, certificate, key)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"openssl {arguments[0]} failed: {done.stderr}")
