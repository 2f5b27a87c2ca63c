"""requests alone, with the headers that an app of the days of AWS signatures sends; prints what it got as JSON.

OPEN is an address of the proxy at which the path names the account; that of `private` has data elements.
"""

import json
import os
import sys

import requests

SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=the-apps-old-key/20230101/eu-west-1/execute-api, Signature=0",
    "x-amz-access-token": "Atza|the-apps-old-token",
    "x-amz-content-sha256": "the-apps-old-digest",
    "x-amz-date": "20230101T000000Z",
    "x-amz-security-token": "the-apps-old-session",
}
APP = {"client_id": "the-apps-old-id", "client_secret": "the-apps-old-secret"}
QUERY = {"MarketplaceIds": "A1PA6795UKMFR9", "CreatedAfter": "2026-01-01T00:00:00Z"}


def call(method, path, account="demo", token=None, **more):
    """Return an answer by way of the proxy."""
    headers = SIGNED | ({"x-amz-access-token": token} if token else {})
    address = f"{os.environ['OPEN']}/@{account}/eu{path}"
    return requests.request(method, address, headers=headers, timeout=30, **more)


def failure(answer):
    """Return the status and the code of an answer that is an error."""
    return [answer.status_code, answer.json()["errors"][0]["code"]]


token = requests.post(
    f"{os.environ['OPEN']}/auth/o2/token",
    data=APP | {"grant_type": "refresh_token", "refresh_token": "Atzr|the-apps-old-refresh-token"},
    timeout=30,
).json()["access_token"]
page = call("GET", "/orders/v0/orders", token=token, params=QUERY).json()["payload"]
found = {"orders": [order["AmazonOrderId"] for order in page["Orders"]], "pages": 1}
while "NextToken" in page:
    page = call("GET", "/orders/v0/orders", params=QUERY | {"NextToken": page["NextToken"]}).json()["payload"]
    found["pages"] += 1
found["destinations"] = len(call("GET", "/notifications/v1/destinations").json()["payload"])

address = call("GET", "/orders/v0/orders/902-1/address").json()["payload"]
found["city"] = address["ShippingAddress"]["City"]
asked = {"restrictedResources": [{"method": "GET", "path": "/orders/v0/orders", "dataElements": ["buyerInfo"]}]}
minted = call("POST", "/tokens/2021-03-01/restrictedDataToken", json=asked).json()["restrictedDataToken"]
restricted = call("GET", "/orders/v0/orders", token=minted, params=QUERY).json()["payload"]["Orders"][0]
found["buyer_by_token"] = restricted["BuyerInfo"]["BuyerEmail"]
found["address_by_token"] = "ShippingAddress" in restricted

content = {"contentType": "text/xml; charset=UTF-8"}
found["document"] = call("POST", "/feeds/2021-06-30/documents", json=content).json()["feedDocumentId"]
feed = {
    "feedType": "POST_PRODUCT_DATA",
    "marketplaceIds": ["A1PA6795UKMFR9"],
    "inputFeedDocumentId": found["document"],
}
found["feed"] = call("POST", "/feeds/2021-06-30/feeds", json=feed).json()["feedId"]

found["forbidden"] = failure(call("GET", "/orders/v0/orders/forbidden"))
found["throttled"] = failure(call("GET", "/orders/v0/orders/throttled"))

private = call("GET", "/orders/v0/orders", "private", params=QUERY).json()["payload"]["Orders"][0]
found["buyer_by_setting"] = private["BuyerInfo"]["BuyerEmail"]
json.dump(found, sys.stdout)
