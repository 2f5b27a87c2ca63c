"""Amazon's own SDK for Python (amzn-sp-api) as apps use it; prints what it got as JSON.

OPEN is an address of the proxy at which the path names the account; that of `private` has data elements.
"""

import json
import os
import sys

from spapi import ApiException, FeedsApi, NotificationsApi, OrdersV0Api, SPAPIClient, SPAPIConfig, TokensApi
from spapi.models.feeds_v2021_06_30 import CreateFeedDocumentSpecification, CreateFeedSpecification
from spapi.models.tokens_v2021_03_01 import CreateRestrictedDataTokenRequest, RestrictedResource

APP = {"client_id": "the-apps-old-id", "client_secret": "the-apps-old-secret"}
TIME = {"created_after": "2026-01-01T00:00:00Z"}


def client_of(account: str, grant: dict[str, str]):
    """Return a client that speaks to the proxy: the two arguments are the whole of the move."""
    address = os.environ["OPEN"]
    config = SPAPIConfig(**APP, **grant, region="EU")
    client = SPAPIClient(config, oauth_endpoint=f"{address}/auth/o2/token", endpoint=f"{address}/@{account}/eu")
    return client.api_client


class RestrictedDataToken:
    """Brings a Restricted Data Token where the SDK asks for an access token."""

    def __init__(self, token: str) -> None:
        self.token = token

    def get_lwa_access_token(self) -> str:
        """Return it."""
        return self.token


def failure(call, *arguments):
    """Return the status and the code of a call that fails."""
    try:
        call(*arguments)
    except ApiException as error:
        return [error.status, json.loads(error.body)["errors"][0]["code"]]
    return None


grant = {"refresh_token": "Atzr|the-apps-old-refresh-token"}
plain = client_of("demo", grant)
orders = OrdersV0Api(plain)
page = orders.get_orders(["A1PA6795UKMFR9"], **TIME).payload
found = {"orders": [order.amazon_order_id for order in page.orders], "pages": 1}
while page.next_token:
    page = orders.get_orders(["A1PA6795UKMFR9"], next_token=page.next_token).payload
    found["pages"] += 1

grantless = client_of("demo", {"scope": "sellingpartnerapi::notifications"})
found["destinations"] = len(NotificationsApi(grantless).get_destinations().payload)

found["city"] = orders.get_order_address("902-1").payload.shipping_address.city
wanted = RestrictedResource(method="GET", path="/orders/v0/orders", data_elements=["buyerInfo"])
minted = TokensApi(plain).create_restricted_data_token(CreateRestrictedDataTokenRequest(restricted_resources=[wanted]))
restricted = client_of("demo", grant)
restricted.configuration.access_token_cache = RestrictedDataToken(minted.restricted_data_token)
first = OrdersV0Api(restricted).get_orders(["A1PA6795UKMFR9"], **TIME).payload.orders[0]
found["buyer_by_token"] = first.buyer_info.buyer_email
found["address_by_token"] = first.shipping_address is not None

feeds = FeedsApi(plain)
content = CreateFeedDocumentSpecification(content_type="text/xml; charset=UTF-8")
found["document"] = feeds.create_feed_document(content).feed_document_id
feed = {
    "feed_type": "POST_PRODUCT_DATA",
    "marketplace_ids": ["A1PA6795UKMFR9"],
    "input_feed_document_id": found["document"],
}
found["feed"] = feeds.create_feed(CreateFeedSpecification(**feed)).feed_id

found["forbidden"] = failure(orders.get_order, "forbidden")
found["throttled"] = failure(orders.get_order, "throttled")

private = client_of("private", grant)
first = OrdersV0Api(private).get_orders(["A1PA6795UKMFR9"], **TIME).payload.orders[0]
found["buyer_by_setting"] = first.buyer_info.buyer_email
json.dump(found, sys.stdout)
