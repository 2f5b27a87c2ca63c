"""How is each proxy that is compared set up? All of them forward to the same upstream over TLS, with keep-alive."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.certificates import Certificates, make_certificates
from tests.bench.processes import HOST, Cores, Started, free_port, python, started

_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream amazon {{
        server 127.0.0.1:{upstream};
        keepalive 1000;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass https://amazon;
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Connection "";
            proxy_set_header x-amz-access-token "Atza|benchmark";
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {authority};
        }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class FarEnd:
    """The upstream that runs: its ports on the loopback address, and whose certificates it shows."""

    api_port: int
    token_port: int
    large_port: int
    certificates: Certificates


@dataclass(frozen=True, slots=True)
class Contender:
    """A proxy that runs and listens on `port`."""

    name: str
    process: Started
    port: int


@contextmanager
def far_end(cores: Cores, folder: Path) -> Iterator[FarEnd]:
    """Run the upstream on the cores that are not the proxy's."""
    end = FarEnd(free_port(), free_port(), free_port(), make_certificates(folder))
    ports = ("--api-port", end.api_port, "--token-port", end.token_port, "--large-port", end.large_port)
    files = ("--certificate", end.certificates.certificate, "--key", end.certificates.key)
    command = python("tests.bench.upstream", *ports, *files)
    with started("upstream", command, end.api_port, cores.others, folder):
        yield end


@contextmanager
def sp_api_proxy(end: FarEnd, cores: Cores, folder: Path, *, large: bool = False) -> Iterator[Contender]:
    """Run the real thing, unpaced; with `large` it forwards to the port for large bodies."""
    port = free_port()
    path = folder / "proxy.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(_proxy_config(end, port, end.large_port if large else end.api_port)))
    path.chmod(0o600)
    command = python("proxy", "serve", "--config", path)
    with started("sp-api-proxy", command, port, cores.proxy, folder) as process:
        yield Contender("sp-api-proxy", process, port)


def _proxy_config(end: FarEnd, port: int, upstream: int) -> dict[str, object]:
    return {
        "listen": f"{HOST}:{port}",
        "admin": f"{HOST}:{free_port()}",
        "applications": {"bench": {"client_id": "amzn1.application-oa2-client.bench", "client_secret": "bench"}},
        "accounts": {"bench": {"refresh_tokens": {"eu": "Atzr|bench"}}},
        "endpoints": {"eu": f"https://localhost:{upstream}", "lwa": f"http://{HOST}:{end.token_port}/auth/o2/token"},
        "limits": {"pace": False},
        "pool": {"ca_file": str(end.certificates.authority)},
        "log": {"level": "warning"},
    }


@contextmanager
def bare_aiohttp(end: FarEnd, cores: Cores, folder: Path) -> Iterator[Contender]:
    """Run the bare proxy of this folder."""
    port = free_port()
    upstream = ("--upstream", f"https://localhost:{end.api_port}", "--authority", end.certificates.authority)
    command = python("tests.bench.bare", "--port", port, *upstream)
    with started("bare aiohttp", command, port, cores.proxy, folder) as process:
        yield Contender("bare aiohttp", process, port)


@contextmanager
def nginx(program: str, end: FarEnd, cores: Cores, folder: Path) -> Iterator[Contender]:
    """Run nginx with one worker."""
    port = free_port()
    path = folder / "nginx.conf"
    authority = end.certificates.authority
    path.write_text(_NGINX.format(folder=folder, upstream=end.api_port, port=port, authority=authority))
    command = [program, "-e", "stderr", "-p", str(folder), "-c", str(path)]
    with started("nginx", command, port, cores.proxy, folder) as process:
        yield Contender("nginx", process, port)


def find_nginx() -> str | None:
    """Return where nginx is, None where it is not installed; Debian keeps it off an ordinary user's path."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
