"""Requests to Amazon and its responses: connections, HTTP/1.1, forwarding, deadlines, retries, circuit breakers.

`forward.Forwarder` sends a `call.UpstreamCall` over a `pool.ConnectionPool` and streams the response to the app. May
import the files of proxy.request, none of its other sub-packages.
"""
