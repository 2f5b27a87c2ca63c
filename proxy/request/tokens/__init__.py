"""Tokens: fetched, cached, refreshed, and replaced when Amazon rejects them.

`provider.TokenProvider` gives the token for a route; `placeholder_endpoint.TokenEndpoint` responds to apps that fetch
tokens themselves. May import proxy.request.upstream and proxy.request.ratelimit.
"""
