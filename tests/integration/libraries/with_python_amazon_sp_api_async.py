"""The asynchronous half of python-amazon-sp-api, moved to the proxy by its addresses alone; prints what it got as JSON.

PLAIN and PRIVATE are addresses of the proxy, the second one's account with data elements.
"""

import asyncio
import json
import os
import sys

from sp_api.asyncio.api import FeedsV20210630, Notifications, OrdersV0, Sellers
from sp_api.asyncio.auth import AccessTokenClient
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
TIME = {"CreatedAfter": "2026-01-01T00:00:00Z"}


async def failure(call, *arguments):
    """Return the status and the code of a call that fails."""
    try:
        await call(*arguments)
    except SellingApiException as error:
        return [error.code, error.amzn_code]
    return None


async def main():
    """Make the calls."""
    move_to(os.environ["PLAIN"])
    async with OrdersV0(marketplace=Marketplaces.DE, credentials=SECRETS) as orders:
        page = (await orders.get_orders(**TIME)).payload
        found = {"orders": [order["AmazonOrderId"] for order in page["Orders"]], "pages": 1}
        while "NextToken" in page:
            page = (await orders.get_orders(NextToken=page["NextToken"], **TIME)).payload
            found["pages"] += 1
        found["city"] = (await orders.get_order_address("902-1")).payload["ShippingAddress"]["City"]
        found["forbidden"] = await failure(orders.get_order, "forbidden")
        found["throttled"] = await failure(orders.get_order, "throttled")
        restricted = (await orders.get_orders(RestrictedResources=["buyerInfo"], **TIME)).payload["Orders"][0]
        found["buyer_by_token"] = restricted["BuyerInfo"]["BuyerEmail"]
        found["address_by_token"] = "ShippingAddress" in restricted

    async with Notifications(marketplace=Marketplaces.DE, credentials=SECRETS) as notifications:
        found["destinations"] = len((await notifications.get_destinations()).payload)

    async with FeedsV20210630(marketplace=Marketplaces.DE, credentials=SECRETS) as feeds:
        feed = await feeds.create_feed("POST_PRODUCT_DATA", "amzn1.tortuga.3.simulated")
        found["feed"] = feed.payload["feedId"]

    async with Sellers(marketplace=Marketplaces.US, credentials=SECRETS) as sellers:
        sold_in = (await sellers.get_marketplace_participation()).payload
        found["elsewhere"] = sold_in[0]["marketplace"]["countryCode"]

    move_to(os.environ["PRIVATE"])
    async with OrdersV0(marketplace=Marketplaces.DE, credentials=SECRETS) as orders:
        private = (await orders.get_orders(**TIME)).payload["Orders"][0]
        found["buyer_by_setting"] = private["BuyerInfo"]["BuyerEmail"]
    json.dump(found, sys.stdout)


asyncio.run(main())
