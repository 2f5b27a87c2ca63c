"""Certificates for tests, created by the openssl program: an authority and certificates it issues."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

_CONFIGURATION = """[ca]
default_ca = own
[own]
database = index.txt
new_certs_dir = .
default_md = sha256
serial = serial.txt
policy = any
copy_extensions = copy
x509_extensions = issued
unique_subject = no
[any]
commonName = supplied
[issued]
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""
# Required by RFC 5280 section 4.2.1; VERIFY_X509_STRICT, the default since Python 3.13, rejects a chain without them.
_OF_AN_AUTHORITY = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
_YEARS = {False: ("20200101000000Z", "20990101000000Z"), True: ("20200101000000Z", "20200102000000Z")}


@dataclass(frozen=True)
class Authority:
    """A certificate authority whose files are in `folder`."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> "Authority":
        """Create a new authority."""
        folder.mkdir(exist_ok=True)
        (folder / "ca.conf").write_text(_CONFIGURATION)
        (folder / "index.txt").write_text("")
        authority = cls(folder)
        command = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
        authority._openssl(
            *command, "-subj", f"/CN=authority {folder.name}", *_OF_AN_AUTHORITY, "-keyout", "ca.key", "-out", "ca.crt"
        )
        return authority

    @property
    def certificate(self) -> str:
        """Path of its own certificate, for clients that trust it."""
        return str(self.folder / "ca.crt")

    def issue(self, name: str, *, expired: bool = False, alternative: str | None = None) -> tuple[str, str]:
        """Return the paths of a new certificate and its key; `alternative` is a name such as DNS:localhost."""
        extension = ["-addext", f"subjectAltName={alternative}"] if alternative else []
        new = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *extension]
        self._openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        start, end = _YEARS[expired]
        sign = [
            "ca",
            "-batch",
            "-config",
            "ca.conf",
            "-cert",
            "ca.crt",
            "-keyfile",
            "ca.key",
            "-notext",
            "-rand_serial",
        ]
        self._openssl(*sign, "-in", f"{name}.csr", "-out", f"{name}.crt", "-startdate", start, "-enddate", end)
        return str(self.folder / f"{name}.crt"), str(self.folder / f"{name}.key")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=self.folder)
