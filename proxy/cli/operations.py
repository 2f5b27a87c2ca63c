"""`operations`: list the operations of the table."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from proxy.amazon.operations import Operation, load_table
from proxy.cli.common import OK, Command, print_err, print_out
from proxy.cli.options import day


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", default="", help="part of a name or a path")
    parser.add_argument("--restricted", action="store_true", help="only those that need a Restricted Data Token")
    parser.add_argument("--grantless", action="store_true", help="only those without a selling partner")
    parser.add_argument("--removed-by", metavar="YYYY-MM-DD", type=day, help="only those Amazon removes by that day")
    parser.add_argument("--json", action="store_true", help="JSON, for programs")


def _operations(options: argparse.Namespace) -> int:
    chosen = list(_matches_filter(options))
    if options.json:
        print_out(json.dumps([_as_dict(operation) for operation in chosen], indent=2))
        return OK
    for operation in chosen:
        plan = f"{operation.rate:g}/s burst {operation.burst}" if operation.rate else "no known plan"
        columns = f"{operation.name:<58} {operation.method:<6} {operation.template:<90} {plan:<22} {_marks(operation)}"
        print_out(columns.rstrip())
    print_err(f"{len(chosen)} operations")
    return OK


def _matches_filter(options: argparse.Namespace) -> Iterator[Operation]:
    text = options.text.lower()
    for operation in load_table():
        if text not in operation.name.lower() and text not in operation.template.lower():
            continue
        if (options.restricted and not operation.restricted) or (options.grantless and not operation.scope):
            continue
        if options.removed_by and not (operation.removal_date and operation.removal_date <= options.removed_by):
            continue
        yield operation


def _marks(operation: Operation) -> str:
    marks = ["restricted"] * operation.restricted
    marks += ["grantless"] * bool(operation.scope)
    marks += [f"removed {operation.removal_date}"] * bool(operation.removal_date)
    return ", ".join(marks)


def _as_dict(operation: Operation) -> dict[str, Any]:
    return {name: getattr(operation, name) for name in ("name", *operation.__dataclass_fields__) if name != "_"}


COMMANDS = {
    "operations": Command(
        "sp-api-proxy operations orders --restricted\n"
        "maintainers: sp-api-proxy operations rebuild MODELS_DIR (see its --help)",
        _add_flags,
        _operations,
    )
}
