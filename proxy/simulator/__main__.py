"""`python -m proxy.simulator` is `sp-api-proxy simulate`."""

from proxy.simulator.command import main

raise SystemExit(main())
