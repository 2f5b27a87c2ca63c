"""A call works where Python has neither `select.poll` nor uvloop, as on Windows."""

import json
import signal
import subprocess
import sys
from urllib.request import Request, urlopen

from tests.support.paths import ROOT
from tests.support.proxy_process import START

# What CPython for Windows lacks; selectors then takes `select.select`.
PROGRAM = """
import select, sys
del select.poll, select.epoll
sys.modules["uvloop"] = None  # its import raises ImportError
from proxy.cli.main import main
raise SystemExit(main(["serve", "--demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log-format", "json"]))
"""


def test_two_calls_over_one_connection_to_the_simulator() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = (json.loads(line) for line in process.stderr)
            serving = next(line for line in lines if line["message"] == "serving")
            url = f"http://{serving['listen'][0]}/sellers/v1/marketplaceParticipations"
            for _ in range(2):  # the second call looks whether the connection of the first one is still good
                with urlopen(Request(url, headers={"x-sp-region": "eu"}), timeout=START) as response:
                    assert response.status == 200
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=START)
    assert process.returncode == 0
