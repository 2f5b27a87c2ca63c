"""Rebuild of the operation table from Amazon's models; a command for maintainers, not used at run time.

May import `amazon.operations` only.
"""
