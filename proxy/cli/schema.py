"""`schema`: print the JSON Schema of the configuration."""

import argparse
import json

from proxy.cli.common import OK, Command, no_flags, print_out
from proxy.config.schema import json_schema


def _schema(_: argparse.Namespace) -> int:
    print_out(json.dumps(json_schema(), indent=2))
    return OK


COMMANDS = {"schema": Command("sp-api-proxy schema > schema.json", no_flags, _schema)}
