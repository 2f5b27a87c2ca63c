"""Number of instructions that a process executes, counted by Linux `perf` where it is permitted.

Unlike CPU time, the count hardly depends on other load on the machine. Many virtual machines have no counters.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INSTRUCTIONS = "instructions:u"  # user space only
_TIMEOUT = 5.0  # seconds for perf to acknowledge a command


def can_count(event: str = INSTRUCTIONS) -> bool:
    """Return whether perf is installed, permitted, and has a counter for `event`."""
    program = shutil.which("perf")
    if program is None:
        return False
    command = [program, "stat", "-x", ",", "-e", event, "true"]
    output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT).stderr
    return parse_count(output) is not None


def parse_count(output: str) -> float | None:
    """Return the count in the output of `perf stat -x ,`; None if it has none."""
    for line in output.splitlines():
        with suppress(ValueError):
            return float(line.partition(",")[0])
    return None


@contextmanager
def counting(pid: int, event: str = INSTRUCTIONS) -> Iterator[Callable[[], float | None]]:
    """Count from the start of the block; the yielded function stops and returns the count, None without perf."""
    control, orders = os.pipe()
    responses, output = os.pipe()
    # With control pipes, counting starts and stops at a known moment instead of when perf is ready.
    command = [
        "perf",
        "stat",
        "-x",
        ",",
        "-e",
        event,
        "-p",
        str(pid),
        "-D",
        "-1",
        "--control",
        f"fd:{control},{output}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, pass_fds=(control, output), text=True) as perf:
        os.close(control)
        os.close(output)

        def order(word: bytes) -> None:
            os.write(orders, word + b"\n")
            os.read(responses, 16)

        def end() -> float | None:
            order(b"disable")
            perf.send_signal(2)
            return parse_count(perf.communicate(timeout=_TIMEOUT)[1])

        try:
            order(b"enable")
            yield end
        finally:
            if perf.poll() is None:
                perf.kill()
            os.close(orders)
            os.close(responses)
