"""Log, metrics and request history.

`logging` has the loggers and their formats, `metrics` the Prometheus series, `collectors` their cheap form for the
request path, and `request_history` the last requests. Imports nothing of the proxy but its version.
"""
