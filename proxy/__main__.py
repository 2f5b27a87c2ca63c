"""`python -m proxy` is `sp-api-proxy`."""

from proxy.cli import main

raise SystemExit(main())
