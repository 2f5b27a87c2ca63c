"""The work of goodput.py done by python-amazon-sp-api with its own throttle_retry, in a Python that has it.

Arguments: seconds, clients, the region's address, the token host's, client id, client secret, refresh token. Prints
`[responses, 429s that reached the caller]` as JSON.
"""

import importlib
import json
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit


def main() -> None:
    """Let `clients` threads call as fast as they can for `seconds`."""
    seconds, clients, endpoint, lwa, client_id, client_secret, refresh_token = sys.argv[1:]
    auth: Any = importlib.import_module("sp_api.auth.access_token_client").AccessTokenClient
    auth.scheme, auth.host = "http://", urlsplit(lwa).netloc
    api: Any = importlib.import_module("sp_api.api").ListingsItems
    # The simulator requires the user agent format that Amazon documents; the library's default differs.
    base: Any = importlib.import_module("sp_api.base")
    base.BaseClient.user_agent = "python-amazon-sp-api/2 (Language=Python)"
    retry: Any = importlib.import_module("sp_api.util").throttle_retry
    token_keys = {"lwa_app_id": client_id, "lwa_client_secret": client_secret, "refresh_token": refresh_token}
    end = time.monotonic() + float(seconds)
    counts = [0, 0]
    lock = threading.Lock()

    def work(number: int) -> None:
        client = api(credentials=token_keys, marketplace=base.Marketplaces.DE)
        client.endpoint = endpoint

        one: Any = retry()(lambda: client.get_listings_item("A1SELLER", f"sku-{number}"))

        while time.monotonic() < end:
            try:
                one()
            except base.SellingApiRequestThrottledException:
                with lock:
                    counts[1] += 1
            else:
                with lock:
                    counts[0] += time.monotonic() <= end

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(int(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
