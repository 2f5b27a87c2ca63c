"""What is to be done about each error of the proxy's own?

One sentence or two for each code: the status page says them, and docs/reference/errors.md and docs/errors.md have
them from here.
"""

from collections.abc import Mapping

REMEDIES: Mapping[str, str] = {
    "AccountRequired": "Send `x-sp-account`, begin the path with `/@ACCOUNT/`, or set `default_account`.",
    "BadOption": "Write name and value as the table of headers shows.",
    "BadTarget": "Percent-encode the path; no `.` or `..` segments, no `//` at its start.",
    "ConflictingSources": "Name it once, or the same everywhere.",
    "InvalidInput": (
        "Ask as Amazon's Tokens API wants; `message` says what is wrong, a new token mends one that is not whole."
    ),
    "MalformedRequest": "Check the client that sent it: framing, one `Host`, no body on GET.",
    "RegionNotConfigured": "Add the refresh token, or ask for another region.",
    "RegionRequired": "Send `x-sp-region`, begin the path with `/@ACCOUNT/REGION/`, or name a marketplace.",
    "TokenRequestRefused": "Send `grant_type`; exchange authorization codes with Login with Amazon itself.",
    "UnknownAccount": "Check its spelling; `check` lists the accounts.",
    "UnknownMarketplace": "Check the id; for a new marketplace send `x-sp-region` or list it under `marketplaces`.",
    "UnknownRegion": "Send `na`, `eu` or `fe`.",
    "BrowserRefused": "Call it from a server, not from a page.",
    "CallerRefused": "Send your key as `x-sp-key`; `callers` in the configuration says who there is.",
    "DocumentExpired": (
        "Make the call that named the document again; where documents take long to begin, fetch them sooner."
    ),
    "DocumentRefused": (
        "`message` says what does not fit. Use the address whole and unchanged, as the caller who got it, by the "
        "method it is for; after a restart without `store_key`, ask Amazon again."
    ),
    "HeaderRequired": "Send `x-sp-account`.",
    "NotAllowed": "`message` names the setting that does not allow it: change that, or call something else.",
    "RestrictedDataRefused": (
        "Check the application's restricted roles; `x-sp-data-elements: none` asks without personal data."
    ),
    "MethodNotAllowed": "Use one of these.",
    "BodyTimeout": "Send without long pauses, or raise `timeouts.body_idle`.",
    "HeaderTimeout": "Send the head at once, or raise `timeouts.header`.",
    "HostRefused": "Call it as 127.0.0.1 or localhost, or list the name under `allowed_hosts`.",
    "CallerBusy": "Send fewer at once, or raise `bounds.requests`.",
    "UsagePlanExhausted": (
        "Come back after `Retry-After`, or let the call wait longer: `x-sp-max-wait`, `limits.max_wait`."
    ),
    "HeaderTooLarge": "Send fewer or shorter headers.",
    "InternalError": "Look into the proxy's log and report it.",
    "BadGzip": "Fetch it without `?decompress=1` and look at it; ask Amazon for the document again.",
    "GzipBomb": "Fetch it without `?decompress=1`, and unpack it where it can do no harm.",
    "TokenRefused": (
        "`details` says which credential to replace, by its key and file or variable, or whom to ask; the proxy "
        "takes up a changed file by itself."
    ),
    "UpstreamBroken": "Repeat a read. Before you repeat a write, look whether it was done.",
    "UpstreamUnreachable": "Check the network, `endpoints` and `pool.ca_file`.",
    "AccountBusy": "Send fewer at once, or raise `bounds.account_requests`.",
    "DocumentsBusy": "Wait for `Retry-After`. Fetch fewer at once, or raise `pool.max_connections`.",
    "RegionDown": "Come back after `Retry-After`; Amazon's health page may say more.",
    "ShuttingDown": "Send it to the proxy that comes next. Before you repeat a write, look whether it was done.",
    "TokenUnavailable": "Come back after `Retry-After`. Nothing was sent to the API.",
    "TooManyConnections": (
        "Keep connections open and use them again, or raise `bounds.connections` and the limit of open files."
    ),
    "CallTimeout": "Give the call longer, or ask for less; a write may have been done.",
    "ConnectTimeout": "Try again; if it goes on, check the network and whether `pool.max_connections` are all in use.",
    "TotalTimeout": "Raise `timeouts.total` for very large bodies. Look whether a write was done.",
    "UpstreamTimeout": "Repeat a read. Before you repeat a write, look whether it was done.",
    "HTTPVersionNotSupported": "Send HTTP/1.1.",
}
