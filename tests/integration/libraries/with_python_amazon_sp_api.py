"""python-amazon-sp-api as apps use it, moved to the proxy by its addresses alone; prints what it got as JSON.

PLAIN and PRIVATE are addresses of the proxy, the second one's account with data elements.
"""

import json
import os
import sys

from sp_api.api import FeedsV20210630, Notifications, OrdersV0, Sellers
from sp_api.auth import AccessTokenClient
from sp_api.base import Marketplaces, SellingApiException


def move_to(address: str) -> None:
    """Make this library speak to the proxy: the whole of the move."""
    host = address.removeprefix("http://")
    AccessTokenClient.scheme, AccessTokenClient.host = "http://", host
    os.environ["HTTP_PROXY"] = f"http://{host}"
    for marketplace in Marketplaces:
        # It takes the Host from the ninth character on, as in https://; the @ makes http:// as long.
        marketplace.endpoint = marketplace.endpoint.replace("https://", "http://@")


SECRETS = {
    "refresh_token": "Atzr|the-apps-old-refresh-token",
    "lwa_app_id": "the-apps-old-id",
    "lwa_client_secret": "the-apps-old-secret",
}


def failure(call, *arguments):
    """Return the status and the code of a call that fails."""
    try:
        call(*arguments)
    except SellingApiException as error:
        return [error.code, error.amzn_code]
    return None


move_to(os.environ["PLAIN"])
orders = OrdersV0(marketplace=Marketplaces.DE, credentials=SECRETS)
page = orders.get_orders(CreatedAfter="2026-01-01T00:00:00Z").payload
found = {"orders": [order["AmazonOrderId"] for order in page["Orders"]], "pages": 1}
while "NextToken" in page:
    page = orders.get_orders(NextToken=page["NextToken"], CreatedAfter="2026-01-01T00:00:00Z").payload
    found["pages"] += 1

notifications = Notifications(marketplace=Marketplaces.DE, credentials=SECRETS)
found["destinations"] = len(notifications.get_destinations().payload)

found["city"] = orders.get_order_address("902-1").payload["ShippingAddress"]["City"]
restricted = orders.get_orders(RestrictedResources=["buyerInfo"], CreatedAfter="2026-01-01T00:00:00Z").payload
found["buyer_by_token"] = restricted["Orders"][0]["BuyerInfo"]["BuyerEmail"]
found["address_by_token"] = "ShippingAddress" in restricted["Orders"][0]

feeds = FeedsV20210630(marketplace=Marketplaces.DE, credentials=SECRETS)
found["feed"] = feeds.create_feed("POST_PRODUCT_DATA", "amzn1.tortuga.3.simulated").payload["feedId"]

found["forbidden"] = failure(orders.get_order, "forbidden")
found["throttled"] = failure(orders.get_order, "throttled")

sold_in = Sellers(marketplace=Marketplaces.US, credentials=SECRETS).get_marketplace_participation().payload
found["elsewhere"] = sold_in[0]["marketplace"]["countryCode"]

move_to(os.environ["PRIVATE"])
private = OrdersV0(marketplace=Marketplaces.DE, credentials=SECRETS).get_orders(CreatedAfter="2026-01-01T00:00:00Z")
found["buyer_by_setting"] = private.payload["Orders"][0]["BuyerInfo"]["BuyerEmail"]
json.dump(found, sys.stdout)
