"""curl alone, one process a call; prints what it got as JSON.

OPEN is an address of the proxy at which the path names the account; that of `private` has data elements.
"""

import json
import os
import subprocess
import sys

OPEN = os.environ["OPEN"]
ORDERS = "/orders/v0/orders?MarketplaceIds=A1PA6795UKMFR9&CreatedAfter=2026-01-01T00%3A00%3A00Z"


def curl(address, *arguments):
    """Return the status and the JSON of an answer."""
    command = ("curl", "--silent", "--show-error", "--max-time", "30", "--write-out", r"\n%{http_code}")
    printed = subprocess.run((*command, *arguments, address), check=True, stdout=subprocess.PIPE).stdout.decode()
    body, _, status = printed.rpartition("\n")
    return int(status), json.loads(body)


def get(path, account="demo", token="Atza|the-apps-old-token"):
    """Return the status and the JSON of what is read."""
    return curl(f"{OPEN}/@{account}/eu{path}", "--header", f"x-amz-access-token: {token}")


def post(path, content):
    """Return the JSON that is answered to some."""
    return curl(f"{OPEN}/@demo/eu{path}", "--json", json.dumps(content))[1]


def failure(path):
    """Return the status and the code of a call that fails."""
    status, content = get(path)
    return [status, content["errors"][0]["code"]]


form = "grant_type=refresh_token&refresh_token=the-apps-old-refresh-token&client_secret=the-apps-old-secret"
token = curl(f"{OPEN}/auth/o2/token", "--data", form)[1]["access_token"]
page = get(ORDERS, token=token)[1]["payload"]
found = {"orders": [order["AmazonOrderId"] for order in page["Orders"]], "pages": 1}
while "NextToken" in page:
    page = get(f"{ORDERS}&NextToken={page['NextToken']}")[1]["payload"]
    found["pages"] += 1
found["destinations"] = len(get("/notifications/v1/destinations")[1]["payload"])

found["city"] = get("/orders/v0/orders/902-1/address")[1]["payload"]["ShippingAddress"]["City"]
resource = {"method": "GET", "path": "/orders/v0/orders", "dataElements": ["buyerInfo"]}
minted = post("/tokens/2021-03-01/restrictedDataToken", {"restrictedResources": [resource]})["restrictedDataToken"]
restricted = get(ORDERS, token=minted)[1]["payload"]["Orders"][0]
found["buyer_by_token"] = restricted["BuyerInfo"]["BuyerEmail"]
found["address_by_token"] = "ShippingAddress" in restricted

content_type = {"contentType": "text/xml; charset=UTF-8"}
found["document"] = post("/feeds/2021-06-30/documents", content_type)["feedDocumentId"]
feed = {"feedType": "POST_PRODUCT_DATA", "marketplaceIds": ["A1PA6795UKMFR9"], "inputFeedDocumentId": found["document"]}
found["feed"] = post("/feeds/2021-06-30/feeds", feed)["feedId"]

found["forbidden"] = failure("/orders/v0/orders/forbidden")
found["throttled"] = failure("/orders/v0/orders/throttled")

private = get(ORDERS, "private")[1]["payload"]["Orders"][0]
found["buyer_by_setting"] = private["BuyerInfo"]["BuyerEmail"]
json.dump(found, sys.stdout)
