"""`python -m proxy` is `sp-api-proxy`."""

from proxy.cli.main import main

raise SystemExit(main())
