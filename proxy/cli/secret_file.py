"""How is a secret put into a file: readable by nobody else, and whole or not at all?"""

import contextlib
import os
import tempfile
from pathlib import Path

from proxy.config import Secret


class CannotStore(Exception):
    """The file cannot be written; the text says why."""


def ensure_writable(path: Path, *, replace: bool) -> None:
    """Find out whether a file can be written there, before a person is sent to Amazon; raise CannotStore."""
    if not path.parent.is_dir():
        raise CannotStore(f"{path.parent}: there is no such folder; make it first, for yourself alone (mode 700)")
    if path.is_dir():
        raise CannotStore(f"{path}: is a folder; name a file in it")
    if os.path.lexists(path) and not replace:
        raise CannotStore(f"{path}: is there already; --force replaces it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CannotStore(f"{path.parent}: you may not write there")


def write_secret(path: Path, text: Secret, *, replace: bool) -> None:
    """Write a secret into a file of mode 0600, whole or not at all; raise CannotStore.

    Without `replace`, a file that came there meanwhile stays.
    """
    temporary = ""
    try:
        # Made with mode 0600, under a name that nobody else can have taken.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{text.reveal()}\n")
            file.flush()
            os.fsync(file.fileno())
        _write_atomically(temporary, path, replace=replace)
    except FileExistsError as exc:
        raise CannotStore(f"{path}: is there already; --force replaces it") from exc
    except OSError as exc:
        raise CannotStore(f"{path}: {os.strerror(exc.errno or 0)}") from exc
    finally:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()


def _write_atomically(temporary: str, path: Path, *, replace: bool) -> None:
    if not replace:
        try:
            os.link(temporary, path)  # unlike a renaming, it replaces nothing
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if os.path.lexists(path):
                raise FileExistsError from None
        else:
            return
    Path(temporary).replace(path)
