"""Secret files: read the value of a `{file: PATH}`, read it again after a rotation, and check its permissions."""

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from proxy.config.merge import MergedSettings, listeners_in, mapping_at
from proxy.config.secret import SourcedStr
from proxy.config.yaml_reader import KeyPath, Problem, Tree, format_path, without_secret

PLACEHOLDER = "unset"  # stands in for a value that could not be read, so that its type is not reported as well
_MAX_BYTES = 64 * 1024

# Group read is allowed: Kubernetes mounts secrets group-readable when `fsGroup` is set.
# OpenSSH rejects such private keys too.
_OTHER_READERS = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP


def read_secret_file(path: Path, key_path: KeyPath, merged: MergedSettings) -> str:
    """Return the text of a file without surrounding white space; record a problem where it cannot be used."""
    # The name can itself be a secret: a token that was written where a path belongs.
    where, name = merged.origins.get(key_path, ""), without_secret(str(path))
    merged.files.append(path)
    try:
        text = _text_of(path)
    except OSError as exc:
        # strerror and not str(exc), which quotes the path unredacted.
        merged.problems.append(Problem(format_path(key_path), f"file {name}: {os.strerror(exc.errno or 0)}", where))
        return PLACEHOLDER
    except ValueError:  # undecodable text, or a NUL byte in the file's name
        merged.problems.append(Problem(format_path(key_path), f"file {name} is not UTF-8 text", where))
        return PLACEHOLDER
    if not text.strip() or len(text) > _MAX_BYTES:
        state = "is empty" if not text.strip() else f"is larger than {_MAX_BYTES // 1024} KiB"
        merged.problems.append(Problem(format_path(key_path), f"file {name} {state}", where))
        return PLACEHOLDER
    merged.origins[key_path] = f"{where}, from file {path}" if where else f"file {path}"
    merged.insecure_files += _permission_problems(path, key_path, where)
    return SourcedStr.of(text.strip(), partial(_reread, path), f"file {path}")


def read_nested_files(value: Any, path: KeyPath, merged: MergedSettings) -> Any:
    """Return `value` with every `{file: …}` in it replaced by the file's text; relative to the working directory."""
    if isinstance(value, dict):
        if set(value) == {"file"} and isinstance(value["file"], str):
            return read_secret_file(Path(value["file"]), path, merged)
        return {key: read_nested_files(below, (*path, key), merged) for key, below in value.items()}
    if isinstance(value, list):
        return [read_nested_files(below, (*path, index), merged) for index, below in enumerate(value)]
    return value


def _text_of(path: Path) -> str:
    # utf-8-sig: editors on Windows write a byte order mark, which would become part of the secret.
    with path.open(encoding="utf-8-sig") as file:
        # Bounded, because the path may be a device such as /dev/zero; one more, so that the caller sees a longer file.
        return file.read(_MAX_BYTES + 1)


def _reread(path: Path) -> str | None:
    """Return the current text of a secret file, None where it cannot be used."""
    try:
        text = _text_of(path)
    except (OSError, ValueError):
        return None  # a file that is being replaced can be absent or incomplete for a moment
    return text.strip() if len(text) <= _MAX_BYTES else None


def record_insecure_files(merged: MergedSettings, path: str | None) -> None:
    """Check the permissions of the files that are not secret files: the configuration file and the TLS keys."""
    written = next(
        (key for key in _secret_keys(merged.tree) if ", from" not in merged.origins.get(key, ", from")), None
    )
    if path is not None and written is not None and merged.origins[written].startswith(f"{path}:"):
        merged.insecure_files += _permission_problems(Path(path), written, merged.origins[written])
    for index, listener in enumerate(listeners_in(merged.tree)):
        tls = listener.get("tls")
        key_file = tls.get("key") if isinstance(tls, dict) else None
        if isinstance(key_file, str) and Path(key_file).is_file():
            key_path: KeyPath = ("listen", index, "tls", "key")
            merged.insecure_files += _permission_problems(Path(key_file), key_path, merged.location_of(key_path))


def _permission_problems(path: Path, key_path: KeyPath, where: str) -> list[Problem]:
    """Return a problem where other users can read or change a file that holds a secret; none on Windows."""
    # stat() follows links: the mode of a link itself is always 0777 on Linux (symlink(7)), and Kubernetes mounts links.
    if os.name != "posix" or not path.stat().st_mode & _OTHER_READERS:
        return []
    return [
        Problem(
            format_path(key_path), f"file {path} holds a secret that other users can read or change: chmod 600", where
        )
    ]


def _secret_keys(tree: Tree) -> Iterator[KeyPath]:
    """Yield the key path of every secret."""
    for name, application in mapping_at(tree, "applications").items():
        if isinstance(application, dict) and "client_secret" in application:
            yield ("applications", name, "client_secret")
    for name, account in mapping_at(tree, "accounts").items():
        tokens = account.get("refresh_tokens") if isinstance(account, dict) else None
        regions = tokens if isinstance(tokens, dict) else ()
        yield from (("accounts", name, "refresh_tokens", region) for region in regions)
    for name, caller in mapping_at(tree, "callers").items():
        if isinstance(caller, dict) and "key" in caller:
            yield ("callers", name, "key")
    if "store_key" in tree:
        keys = tree["store_key"]
        yield from (("store_key", index) for index in range(len(keys))) if isinstance(keys, list) else (("store_key",),)
    if mapping_at(tree, "tracing").get("headers") is not None:
        yield ("tracing", "headers")
