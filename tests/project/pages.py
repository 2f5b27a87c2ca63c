"""Execution of a documentation page as one session of a reader.

The fenced blocks of a page are run in order, in a folder of their own. What is done depends on the language:

    sh            run by bash; must exit with 0, or with the number in `sh exit=2`
    sh until      repeated until it prints what is expected: for effects that take a moment
    sh server     started in the background, as in another terminal; replaces an earlier instance of the same server
    python, js    run unchanged
    yaml          must be a valid configuration of the proxy, or a valid manifest if it has a `kind`
    promql        must be a valid query
    output        what the block before it prints; `…` matches anything within a line, and alone any lines

A block whose first line names a file (`# config.yaml`, `// call.mjs`) is written to that file and not run. Ports of
this machine are replaced by free ones, and restored in the output. A block after a comment `<!-- not run: REASON -->`
is only inspected.
"""

import contextlib
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import yaml
from markdown_it import MarkdownIt

from proxy.config import load_config
from tests.support.paths import ROOT

TIMEOUT = 90.0  # seconds for one block, generous for a busy machine
KUBERNETES = "1.29"  # the oldest with native sidecars

_FILE = re.compile(r"\A(?:#|//) ([\w./-]+\.(?:yaml|yml|py|mjs|sh))\n")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_PORT = re.compile(r"(?P<before>(?:127\.0\.0\.1|localhost|0\.0\.0\.0):|--port )(?P<port>[1-9]\d{2,4})\b")
_READY = re.compile(r"serving|listens|Ready to accept connections|Serving HTTP")
_SIMULATOR = range(9700, 9704)  # it uses four consecutive ports
_FREE = range(20_000, 30_000)  # below the ephemeral port range
# The command of the installed package, at the ports of this session.
_COMMAND = """\
#!/bin/bash
file=${{SP_API_PROXY_CONFIG:-}}
for ((n = 1; n < $#; n++)); do [ "${{!n}}" != --config ] || {{ m=$((n + 1)); file=${{!m}}; }}; done
grep -qs '^listen:' "$file" || export SP_API_PROXY_LISTEN=127.0.0.1:{listen}
grep -qs '^admin:' "$file" || export SP_API_PROXY_ADMIN=127.0.0.1:{admin}
PYTHONWARNINGS=error exec {python} -m proxy "$@"
"""


class PageError(AssertionError):
    """A page that does not work as written; the message names the line."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its first line number, its info string, its text, and why it is not run, if so."""

    line: int
    language: str
    options: tuple[str, ...]
    text: str
    not_run: str | None = None


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    reason: str | None = None
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence":
            language, *options = token.info.split() or [""]
            line = token.map[0] + 1 if token.map else 0
            yield Block(line, language, tuple(options), token.content, reason)
        if token.type in {"fence", "html_block"}:
            found = _NOT_RUN.search(token.content) if token.type == "html_block" else None
            reason = found[1] if found else None


def same(expected: str, printed: str) -> bool:
    """Return whether a page's output matches what was printed."""
    lines = (
        r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line.rstrip()).replace("…", ".*?") + r"\n"
        for line in expected.rstrip("\n").split("\n")
    )
    return re.fullmatch("".join(lines), _tidy(printed)) is not None


def _tidy(printed: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in printed.rstrip().split("\n"))


class Ports:
    """Mapping from the ports of a page to free ports."""

    def __init__(self) -> None:
        self._taken: dict[int, int] = {}

    def of(self, port: int) -> int:
        """Return the replacement for a port."""
        if port not in self._taken:
            wanted = _SIMULATOR if port in _SIMULATOR else range(port, port + 1)
            self._taken |= zip(wanted, _free_ports(len(wanted)), strict=True)
        return self._taken[port]

    def there(self, text: str) -> str:
        """Return the text of a page with the ports of this session."""
        return _PORT.sub(lambda found: f"{found['before']}{self.of(int(found['port']))}", text)

    def back(self, text: str) -> str:
        """Return printed text with the ports of the page."""
        for port, taken in self._taken.items():
            text = re.sub(rf"(?<=:){taken}\b", str(port), text)
        return text


def _free_ports(count: int) -> range:
    while True:
        first = random.randrange(_FREE.start, _FREE.stop, count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return range(first, first + count)


@dataclass
class Server:
    """A background process, and the file with its output."""

    process: subprocess.Popen[bytes]
    said: Path

    def text(self) -> str:
        """Return its output so far."""
        return self.said.read_text(encoding="utf-8")

    def stop(self) -> int:
        """End it like Ctrl-C if it still runs, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(TIMEOUT)


@dataclass
class Session:
    """Folder, environment and servers of one page."""

    folder: Path
    ports: Ports = field(default_factory=Ports)
    servers: dict[str, Server] = field(default_factory=dict)
    printed: str = ""
    last: Block | None = None

    def __post_init__(self) -> None:
        """Create what a reader has: the commands, and the files of a checkout."""
        self._behind = self.folder / ".session"
        commands = self._behind / "bin"
        commands.mkdir(parents=True)
        for name in ("config", "proxy", "docker-compose.yml", "Dockerfile"):
            (self.folder / name).symlink_to(ROOT / name)
        ours = _COMMAND.format(listen=self.ports.of(8080), admin=self.ports.of(9090), python=sys.executable)
        python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        pytest = (
            f'#!/bin/sh\nPYTEST_DISABLE_PLUGIN_AUTOLOAD=1 exec {sys.executable} -m pytest -p no:cacheprovider "$@"\n'
        )
        for name, script in {"sp-api-proxy": ours, "python": python, "python3": python, "pytest": pytest}.items():
            (commands / name).write_text(script, encoding="utf-8")
            (commands / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if name.startswith(("COVERAGE", "LANG"))}
        path = f"{commands}:{os.environ['PATH']}"
        self._environment = {**kept, "PATH": path, "HOME": str(self.folder), "PYTHONPATH": str(ROOT)}

    # Blocks.

    def do(self, block: Block) -> None:
        """Execute a block; raise PageError if the result differs from the page."""
        if block.not_run is not None:
            look_at(block)
        elif block.language == "output":
            self._compare(block)
        elif named := _FILE.match(block.text):
            self._write(block, named[1])
        elif block.language in {"sh", "python", "js"}:
            self._run(block)
        elif block.language == "yaml":
            self._check_yaml(block)
        elif block.language == "promql":
            promql_parser.parse(block.text)
        else:
            raise PageError(f"line {block.line}: nothing runs a block of {block.language or 'no language'}")
        self.last = block

    def _write(self, block: Block, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.ports.there(block.text), encoding="utf-8")
        if block.language == "yaml":
            self._check_yaml(block, path)

    def _run(self, block: Block) -> None:
        if "server" in block.options:
            self._serve(block)
        elif "until" not in block.options:  # `until` runs when its output block is compared
            self.printed = self._printed_by(block)

    def _printed_by(self, block: Block) -> str:
        wanted = next((int(option[5:]) for option in block.options if option.startswith("exit=")), 0)
        code, printed = self._execute(block)
        if code != wanted:
            raise PageError(f"line {block.line}: ended with {code} instead of {wanted}\n{block.text}\n{printed}")
        return printed

    def _execute(self, block: Block) -> tuple[int, str]:
        state, text = self._behind / "environment", self.ports.there(block.text)
        if block.language == "sh":
            known = f". {state}\n" if state.exists() else ""
            words = ["bash", "-eu", "-o", "pipefail", "-c", f"{known}{text}\nexport -p >{state}"]
        else:
            script = self._behind / {"python": "block.py", "js": "block.mjs"}[block.language]
            script.write_text(text, encoding="utf-8")
            words = [sys.executable if block.language == "python" else "node", str(script)]
        said = self._behind / "printed"
        with said.open("wb") as file, self._started(words, file) as process:
            try:
                code = process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise PageError(f"line {block.line}: still running after {TIMEOUT:g} s\n{block.text}") from None
        return code, self.ports.back(said.read_text(encoding="utf-8"))

    def _started(self, words: list[str], file: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    # Servers.

    def _serve(self, block: Block) -> None:
        name = " ".join([*block.text.split()[:2], *block.options])
        if name in self.servers:
            self._end(name)
        state = self._behind / "environment"
        known = f". {state}\n" if state.exists() else ""
        said = self._behind / f"server-{len(list(self._behind.glob('server-*')))}"
        with said.open("wb") as file:
            process = self._started(["bash", "-eu", "-c", f"{known}exec {self.ports.there(block.text)}"], file)
        server = self.servers[name] = Server(process, said)
        ready = until(lambda: process.poll() is not None or _READY.search(server.text()) is not None)
        if not ready or process.poll() is not None:
            raise PageError(f"line {block.line}: does not serve\n{block.text}\n{server.text()}")

    def _end(self, name: str) -> None:
        server = self.servers.pop(name)
        code = server.stop()
        if code != 0:
            raise PageError(f"`{name}` ended with {code}\n{server.text()}")

    def end(self) -> None:
        """End all servers, the newest first; every server is ended even if one fails."""
        wrong = []
        for name in reversed(list(self.servers)):
            try:
                self._end(name)
            except PageError as exc:
                wrong.append(str(exc))
        if wrong:
            raise PageError("\n".join(wrong))

    # Output.

    def _compare(self, block: Block) -> None:
        before = self.last
        if before is None or before.language not in {"sh", "python", "js"}:
            raise PageError(f"line {block.line}: no block before it prints anything")
        if "server" in before.options:
            server = list(self.servers.values())[-1]
            until(lambda: same(block.text, self.ports.back(server.text())))
            self.printed = self.ports.back(server.text())
        elif "until" in before.options:
            until(lambda: same(block.text, self._repeated(before)))
        if not same(block.text, self.printed):
            raise PageError(
                f"line {block.line}: prints something else\n--- the page\n{block.text}--- printed\n{self.printed}"
            )

    def _repeated(self, block: Block) -> str:
        self.printed = self._execute(block)[1]
        return self.printed

    # Configurations and manifests.

    def _check_yaml(self, block: Block, path: Path | None = None) -> None:
        documents = [each for each in yaml.safe_load_all(block.text) if each is not None]
        if all("kind" in each for each in documents):
            for each in documents:
                kubernetes_validate.validate(each, KUBERNETES, strict=True)
            return
        (settings,) = documents
        if path is None:  # part of a configuration: required settings are added
            path = self.folder / ".part.yaml"
            path.write_text(yaml.safe_dump(_completed(settings)), encoding="utf-8")
        names = re.findall(r"\$\{(\w+)\}", path.read_text(encoding="utf-8"))
        load_config(str(path), {name: f"made-up-{name}" for name in names})


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    accounts = {"acme": {"refresh_tokens": {"eu": "made-up"}}}
    return {
        "applications": {"main": {"client_id": "made-up", "client_secret": "made-up"}},
        "accounts": accounts,
    } | settings


def look_at(block: Block) -> None:
    """Inspect a block that is not run: the files that it names must exist."""
    for name in re.findall(r"(?<![\w/-])(?:config|docs|tests|proxy)/[\w./-]+", block.text):
        if not (ROOT / name).exists():
            raise PageError(f"line {block.line}: there is no {name}")


def proxy_commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each command of the proxy in a page, on a line or within backticks."""
    inline = re.findall(r"`sp-api-proxy ([a-z][^`\n]*)`", text)
    lines = [
        line.removeprefix("sp-api-proxy ")
        for block in blocks(text)
        if block.language == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.startswith("sp-api-proxy ")
    ]
    for line in (*inline, *lines):
        words = shlex.split(line, comments=True)
        end = next(
            (n for n, word in enumerate(words) if word in {"|", "&&", "||", "&", ">", "2>", ";", "2>&1"}), len(words)
        )
        yield words[:end]


def until(happens: Any) -> bool:
    """Wait until a condition holds, and return whether it did in time."""
    end = time.monotonic() + TIMEOUT
    while not happens():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)  # the condition depends on other processes, which cannot notify
    return True


def run_page(text: str, folder: Path) -> int:
    """Execute a page from start to end; return how many blocks were not run."""
    session = Session(folder)
    page = list(blocks(text))
    try:
        for block in page:
            session.do(block)
    except BaseException:
        with contextlib.suppress(PageError):
            session.end()
        raise
    session.end()
    return sum(block.not_run is not None for block in page)
