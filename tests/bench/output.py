"""Output of the benchmarks: results on standard output, progress on standard error."""

import sys


def print_lines(*lines: str) -> None:
    """Print lines at once, also into a pipe."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def print_progress(text: str) -> None:
    """Print a line of progress."""
    sys.stderr.write(f"{text}\n")
