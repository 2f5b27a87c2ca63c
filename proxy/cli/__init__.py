"""The commands, one file each: what they take, what they print, their exit codes.

A command imports what it needs when it runs: containers run `healthcheck` every few seconds. May import everything.
"""
