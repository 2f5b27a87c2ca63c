"""Setup of sp-api-proxy and nginx for large bodies and many clients: both stream and buffer nothing on disk.

Each has two upstreams: one with small responses, and, for requests with `x-sp-region: na`, one with large bodies.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.compared_proxies import BenchUpstream, ComparedProxy
from tests.bench.processes import HOST, Cores, free_port, python, started

DESCRIPTORS = 20_000  # of nginx, if the system permits it

_NGINX = """
daemon off;
worker_processes 1;
worker_rlimit_nofile {descriptors};
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections {descriptors}; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 600s;
    client_max_body_size 0;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream small {{
        server 127.0.0.1:{small};
        keepalive 1000;
        keepalive_requests 1000000000;
    }}
    upstream large {{
        server 127.0.0.1:{large};
        keepalive 1000;
        keepalive_requests 1000000000;
    }}
    map $http_x_sp_region $upstream {{
        default small;
        na large;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass https://$upstream;
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_max_temp_file_size 0;
            {buffers}
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

# The defaults are 4 or 8 KiB for a response, and 8 or 16 KiB for a request.
_LARGE_BUFFERS = (
    "proxy_buffer_size 64k; proxy_buffers 8 64k; proxy_busy_buffers_size 128k; client_body_buffer_size 256k;"
)


@contextmanager
def bulk_upstream(upstream: BenchUpstream, cores: Cores, folder: Path) -> Iterator[int]:
    """Run the upstream for large bodies; yield its port."""
    port = free_port()
    files = ("--certificate", upstream.certificates.certificate, "--key", upstream.certificates.key)
    with started("bulk", python("tests.bench.bulk", "--port", port, *files), port, cores.other_cores, folder):
        yield port


@contextmanager
def our_proxy(
    upstream: BenchUpstream, large: int, cores: Cores, folder: Path, **settings: Any
) -> Iterator[ComparedProxy]:
    """Run sp-api-proxy without pacing, with additional `settings`."""
    port = free_port()
    path = folder / "peer.yaml"
    upstreams = {"eu": f"https://localhost:{upstream.api_port}", "na": f"https://localhost:{large}"}
    content = {
        "listen": f"{HOST}:{port}",
        "admin": None,
        "applications": {"bench": {"client_id": "amzn1.application-oa2-client.bench", "client_secret": "bench"}},
        "accounts": {"bench": {"refresh_tokens": {"eu": "Atzr|eu", "na": "Atzr|na"}}},
        "endpoints": {**upstreams, "lwa": f"http://{HOST}:{upstream.token_port}/auth/o2/token"},
        "limits": {"pace": False},
        "pool": {"ca_file": str(upstream.certificates.authority), **settings.pop("pool", {})},
        "log": {"level": "warning"},
        **settings,
    }
    path.write_text(json.dumps(content))  # JSON is YAML
    path.chmod(0o600)
    command = python("proxy", "serve", "--config", path)
    with started("sp-api-proxy", command, port, cores.proxy, folder) as process:
        yield ComparedProxy("sp-api-proxy", process, port)


@contextmanager
def streaming_nginx(
    program: str, upstream: BenchUpstream, large: int, cores: Cores, folder: Path, *, large_buffers: bool = False
) -> Iterator[ComparedProxy]:
    """Run nginx with one worker, with its default buffer sizes or with `large_buffers`."""
    port = free_port()
    name = "nginx, large buffers" if large_buffers else "nginx"
    own = folder / name.replace(", ", "-").replace(" ", "-")
    own.mkdir()
    values = {"folder": own, "small": upstream.api_port, "large": large, "port": port, "descriptors": DESCRIPTORS}
    values |= {"authority": upstream.certificates.authority, "buffers": _LARGE_BUFFERS if large_buffers else ""}
    path = own / "nginx.conf"
    path.write_text(_NGINX.format(**values))
    command = [program, "-e", "stderr", "-p", str(own), "-c", str(path)]
    with started(name, command, port, cores.proxy, folder) as process:
        yield ComparedProxy(name, process, port)


def processes_of(group: int) -> Sequence[int]:
    """Return the ids of a proxy's processes: nginx works in a child process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group:
                found.append(int(entry.name))
    return found
