"""The command: `sp-api-proxy`, or `python -m proxy`."""

import sys

# A container's health check runs every few seconds, and needs no more than the standard library.
_NEEDS_NO_LIBRARY = {"healthcheck", "version", "--version", "-h", "--help"}


def main() -> int:
    """Run one command and return its exit code: 1 if an installed dependency is out of the range that works."""
    try:
        if not _NEEDS_NO_LIBRARY.intersection(sys.argv[1:2]):
            from proxy.cli.dependencies import wrong_versions  # noqa: PLC0415 - 20 ms for importlib.metadata

            wrong = wrong_versions()
            if wrong:
                sys.stderr.write("".join(f"{line}\n" for line in wrong))
                return 1
        from proxy.cli.main import main as run  # noqa: PLC0415 - against a wrong version this may fail

        return run()
    except KeyboardInterrupt:  # while modules are imported, which takes half a second
        sys.stderr.write("sp-api-proxy: interrupted\n")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
