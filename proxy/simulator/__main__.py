"""`python -m proxy.simulator` is `sp-api-proxy simulate`."""

from proxy.simulator.cli import main

raise SystemExit(main())
