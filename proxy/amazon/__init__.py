"""What Amazon publishes: operations, marketplaces, token requests, error responses, presigned URLs.

Pure functions and tables, without a clock and without state. Exports nothing itself: import its modules. May import
`config`; `catalog` is the maintainers' rebuild of the operation table and is not imported at run time.
"""
