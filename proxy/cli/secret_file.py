"""Writing a secret to a file: readable by its owner alone, and atomically."""

import contextlib
import os
import tempfile
from pathlib import Path

from proxy.config import Secret


class CannotStore(Exception):
    """The file cannot be written; the message says why."""


def ensure_writable(path: Path, *, replace: bool) -> None:
    """Check that the file can be written, before the user is sent to Amazon; raise CannotStore."""
    if not path.parent.is_dir():
        raise CannotStore(f"{path.parent}: there is no such folder; make it first, for yourself alone (mode 700)")
    if path.is_dir():
        raise CannotStore(f"{path}: is a folder; name a file in it")
    # lexists: a link to a file that does not exist is something that would be replaced, too.
    if os.path.lexists(path) and not replace:
        raise CannotStore(f"{path}: is there already; --force replaces it")
    # Only for an early message: the write itself decides, as this may change until then (CWE-367).
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CannotStore(f"{path.parent}: you may not write there")


def write_secret(path: Path, text: Secret, *, replace: bool) -> None:
    """Write a secret to a file of mode 0600, atomically; raise CannotStore.

    Without `replace`, an existing file is kept.
    """
    temporary = ""
    try:
        # mkstemp creates the file with mode 0600 and a name that does not exist yet (O_EXCL).
        # In the same folder: a rename and a link work within one file system only.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{text.reveal()}\n")
            file.flush()
            # Before the rename: after a crash, a file system may otherwise show the new name with empty content.
            os.fsync(file.fileno())
        _write_atomically(temporary, path, replace=replace)
    except FileExistsError as exc:
        raise CannotStore(f"{path}: is there already; --force replaces it") from exc
    except OSError as exc:
        raise CannotStore(f"{path}: {os.strerror(exc.errno or 0)}") from exc
    finally:
        with contextlib.suppress(OSError):
            # Gone already after a rename. If mkstemp failed, Path("") is the current folder, and unlink raises OSError.
            Path(temporary).unlink()


def _write_atomically(temporary: str, path: Path, *, replace: bool) -> None:
    if not replace:
        try:
            os.link(temporary, path)  # unlike a rename, it never replaces a file
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise FileExistsError from None
        else:
            return
    Path(temporary).replace(path)
