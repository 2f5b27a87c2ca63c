"""Rebuild of the operation table from a folder of Amazon's models: `operations rebuild`, for maintainers.

The models have method, path, plan and sandbox. `overrides.yaml`, maintained by hand, has the rest: restricted and
grantless operations, limits over all accounts, removal dates, and plans that only Amazon's SDK states. The output is
deterministic, sorted by API, version, path and method.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from proxy.amazon.catalog.overrides import BadInput, Overrides, load_overrides
from proxy.amazon.catalog.swagger import Row, model_of, rows_of_model
from proxy.amazon.operations import COLUMNS, read_rows

_PACKAGE = Path(__file__).parent
TABLE = _PACKAGE.parent / "operations.csv"
OVERRIDES = _PACKAGE / "overrides.yaml"

_REQUIRED_COLUMNS = {"api", "version", "operationId", "method", "path"}


def main(argv: list[str] | None = None) -> int:
    """Rebuild the table and print the changes; return 0, or 1 if a file could not be read or written.

    With `--check`, also return 1 if the table would change.
    """
    options = _parser().parse_args(argv)
    try:
        return _rebuild(options)
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sp-api-proxy operations rebuild",
        description="Rebuild the operation table from a folder of Amazon's Swagger models and print the changes: "
        "one line for each operation that is new (+), gone (-) or different (~).",
        epilog="Models are at https://github.com/amzn/selling-partner-api-models, in its folder models. APIs without "
        "a model in the folder keep their rows, unless --prune is given. Exit code 1: a file could not be read, or "
        "--check found changes.",
    )
    parser.add_argument("models", type=Path, metavar="MODELS_DIR", help="searched for *.json, subfolders included")
    parser.add_argument(
        "--facts",
        type=Path,
        default=OVERRIDES,
        metavar="FILE",
        help="facts that the models lack; default: the package's",
    )
    parser.add_argument(
        "--table",
        type=Path,
        default=TABLE,
        metavar="FILE",
        help="the table to compare with and to replace; default: the package's; one that does not exist is empty",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here instead of over the table")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the table would change")
    parser.add_argument("--prune", action="store_true", help="drop the rows of APIs without a model in the folder")
    return parser


def _rebuild(options: argparse.Namespace) -> int:
    facts = load_overrides(options.facts)
    text = _read_table(options.table)
    before = _rows_of_table(text, options.table)
    warnings: list[str] = []
    skipped: list[str] = []
    fresh = list(_rows_of_folder(options.models, facts, warnings, skipped))
    if not fresh:
        _warn([*skipped, *warnings])
        raise BadInput(f"{options.models}: no operation could be read from it, so nothing is written")
    if options.prune and skipped:
        warnings.append("--prune drops nothing while files are skipped: their APIs would be lost")
    after = merged([] if options.prune and not skipped else before, fresh, facts, warnings)
    would_change = as_csv(after) != text
    _report(before, after, would_change=would_change)
    _warn([*skipped, *warnings])
    if not options.check:
        _write(options.output or options.table, as_csv(after))
    return 1 if skipped or (options.check and would_change) else 0


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")


# Files.


def _read_table(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as exc:
        raise BadInput(f"{path}: not readable: {exc}") from exc


def _rows_of_table(text: str, path: Path) -> list[Row]:
    try:
        rows = read_rows(text)
    except csv.Error as exc:
        raise BadInput(f"{path}: not readable as CSV: {exc}") from exc
    header = text.partition("\n")[0].split(",")
    if text.strip() and not (
        set(header) >= _REQUIRED_COLUMNS and all(row[column] for row in rows for column in _REQUIRED_COLUMNS)
    ):
        raise BadInput(
            f"{path}: no operation table: its head or a row lacks one of {', '.join(sorted(_REQUIRED_COLUMNS))}"
        )
    return rows


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as exc:
        raise BadInput(f"{path}: cannot be written: {exc}") from exc


def _rows_of_folder(folder: Path, facts: Overrides, warnings: list[str], skipped: list[str]) -> Iterator[Row]:
    for path in sorted(folder.rglob("*.json")):
        file = path.relative_to(folder).as_posix()
        try:
            model = model_of(json.loads(path.read_text(encoding="utf-8-sig")), file, facts.names)
        except (OSError, ValueError, RecursionError) as exc:
            skipped.append(f"skipped {file}: not readable as JSON ({type(exc).__name__})")
            continue
        if model is None:
            skipped.append(f"skipped {file}: no Swagger model")
            continue
        yield from rows_of_model(model, warnings)


# The table.


def merged(before: Iterable[Row], fresh: Iterable[Row], facts: Overrides, warnings: list[str]) -> list[Row]:
    """Return the rows of the models and the kept rows of other APIs, with all facts, in the table's order."""
    fresh = list(_deduplicated(fresh, warnings))
    modelled = {(row["api"], row["version"]) for row in fresh}
    kept = [row for row in before if (row["api"], row["version"]) not in modelled]
    rows = sorted((facts.apply(row) for row in [*kept, *fresh]), key=_sort_key)
    warnings.extend(_shadowed(rows))
    warnings.extend(facts.unmatched(rows))
    return rows


def _sort_key(row: Row) -> tuple[str, ...]:
    return (row["api"], row["version"], row["path"], row["method"])


def _deduplicated(rows: Iterable[Row], warnings: list[str]) -> Iterator[Row]:
    """Yield the rows; of several rows for one operation, only the first."""
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        if _sort_key(row) in seen:
            warnings.append(f"{_name(row)} {row['method']} {row['path']} is in two models; the first in order counts")
            continue
        seen.add(_sort_key(row))
        yield row


def _shadowed(rows: Iterable[Row]) -> Iterator[str]:
    """Yield a warning for each operation that OperationTable never matches because another API has its path."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        other = first.setdefault((row["method"], row["path"]), row)
        if other is not row:
            yield f"{_name(row)} has the method and path of {_name(other)}, which is found in its place"


def as_csv(rows: Iterable[Row]) -> str:
    """Return the table's text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# What changed.


def _report(before: list[Row], after: list[Row], *, would_change: bool) -> None:
    news = list(changes(before, after))
    for line in [*news, _summary(before, after, news, would_change=would_change)]:
        sys.stdout.write(f"{line}\n")


def changes(before: Iterable[Row], after: Iterable[Row]) -> Iterator[str]:
    """Yield a line for each operation that is new or gone, and for each column that differs."""
    old, new = ({_sort_key(row): row for row in rows} for rows in (before, after))
    for key in sorted(old.keys() | new.keys()):
        if key not in old:
            yield f"+ {_title(new[key])}"
        elif key not in new:
            yield f"- {_title(old[key])}"
        else:
            yield from _differences(old[key], new[key])


def _name(row: Row) -> str:
    return f"{row['api']}.{row['version']}.{row['operationId']}"


def _title(row: Row) -> str:
    return f"{_name(row)} {row['method']} {row['path']}"


def _differences(old: Row, new: Row) -> Iterator[str]:
    for column in COLUMNS:
        if old[column] != new[column]:
            yield f"~ {_name(new)} {column} {old[column] or '(none)'} -> {new[column] or '(none)'}"


def _summary(before: list[Row], after: list[Row], news: list[str], *, would_change: bool) -> str:
    if not news:
        same = "only order or form differ" if would_change else "no change"
        return f"{same}: {len(after)} operations"
    counts = {sign: sum(line.startswith(sign) for line in news) for sign in "+-~"}
    return f"{len(before)} -> {len(after)} operations: {counts['+']} new, {counts['-']} gone, {counts['~']} changes"


if __name__ == "__main__":
    raise SystemExit(main())
