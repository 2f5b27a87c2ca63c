"""Load configurations from text, for the tests of this package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from proxy.config import (
    Config,
    ConfigError,
    KeyPath,
    Loaded,
    dump,
    load_config,
)
from proxy.config.model import Settings, settings_in
from proxy.config.yaml_reader import format_path

APPLICATIONS = "applications: {main: {client_id: client, client_secret: hush}}\n"
ACCOUNTS = "accounts: {acme: {refresh_tokens: {eu: token-eu}}}\n"
BASE = APPLICATIONS + ACCOUNTS
SECRET = "Atzr-LeakedSecret-9f3b"


def load(
    folder: Path,
    text: str | bytes,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[KeyPath, Any] | None = None,
) -> Loaded:
    """Return what a real file with `text` means."""
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(
        str(path), environ or {}, [(format_path(key), value, "--set") for key, value in (flags or {}).items()]
    )


def problems(
    folder: Path,
    text: str | bytes,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[KeyPath, Any] | None = None,
) -> list[str]:
    """Return the problems of a configuration that cannot be used, each without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, environ, flags)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def origins(loaded: Loaded, folder: Path) -> dict[str, str]:
    return {key: origin.replace(f"{folder}/", "") for key, _, origin in loaded.rows()}


def value_at(config: Config, path: KeyPath) -> Any:
    value: Any = dump(config)
    for part in path:
        value = value[part]
    return value


def groups(kind: Any = Config) -> dict[str, type[Settings]]:
    """Return every group of settings by its name, found by walking the types of the fields."""
    found: dict[str, type[Settings]] = {}
    if group := settings_in(kind):
        found[group.__name__] = group
        for field in group.model_fields.values():
            found |= groups(field.annotation)
    for below in get_args(kind):
        found |= groups(below)
    return found
