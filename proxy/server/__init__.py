"""The running process: sockets, HTTP/1.1 towards clients, start and stop in order, reload; `admin` is what watches it.

`runtime.start_proxy` starts everything. May import request, amazon, store, config, observability and errors; inside,
runtime → handover → listeners → {http_server, tls} → http_protocol, and no file imports one that imports it.
"""
