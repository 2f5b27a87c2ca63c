// Amazon's own SDK for JavaScript as apps use it; prints what it got as JSON.
// OPEN is an address of the proxy at which the path names the account; that of `private` has data elements.

import { FeedsSpApi, NotificationsSpApi, OrdersSpApi, TokensSpApi } from "@amazon-sp-api-release/amazon-sp-api-sdk-js";

// The whole of the move: a base URL, and any text for a token, which the SDK would fetch from Amazon itself otherwise.
function client(api, account = "demo") {
  const address = process.env.OPEN;
  const apiClient = new api.ApiClient(`${address}/@${account}/eu`);
  apiClient.applyXAmzAccessTokenToRequest("the-apps-old-token");
  apiClient.disableRateLimiter();
  return apiClient;
}

async function failure(call) {
  try {
    await call();
  } catch (error) {
    return [error.status, error.response.body.errors[0].code];
  }
  return null;
}

const time = { createdAfter: "2026-01-01T00:00:00Z" };
const marketplaces = ["A1PA6795UKMFR9"];
const ordersClient = client(OrdersSpApi);
const orders = new OrdersSpApi.OrdersV0Api(ordersClient);

let page = (await orders.getOrders(marketplaces, time)).payload;
const found = { orders: page.orders.map((order) => order.amazonOrderId), pages: 1 };
while (page.nextToken) {
  page = (await orders.getOrders(marketplaces, { ...time, nextToken: page.nextToken })).payload;
  found.pages += 1;
}
const notifications = new NotificationsSpApi.NotificationsApi(client(NotificationsSpApi));
found.destinations = (await notifications.getDestinations()).payload.length;

found.city = (await orders.getOrderAddress("902-1")).payload.shippingAddress.city;
const tokens = new TokensSpApi.TokensApi(client(TokensSpApi));
const { restrictedDataToken } = await tokens.createRestrictedDataToken({
  restrictedResources: [{ method: "GET", path: "/orders/v0/orders", dataElements: ["buyerInfo"] }],
});
const restrictedClient = client(OrdersSpApi).applyRestrictedDataToken(restrictedDataToken);
const restricted = (await new OrdersSpApi.OrdersV0Api(restrictedClient).getOrders(marketplaces, time)).payload.orders[0];
found.buyer_by_token = restricted.buyerInfo.buyerEmail;
found.address_by_token = restricted.shippingAddress !== undefined;

const feeds = new FeedsSpApi.FeedsApi(client(FeedsSpApi));
found.document = (await feeds.createFeedDocument({ contentType: "text/xml; charset=UTF-8" })).feedDocumentId;
found.feed = (
  await feeds.createFeed({
    feedType: "POST_PRODUCT_DATA",
    marketplaceIds: marketplaces,
    inputFeedDocumentId: found.document,
  })
).feedId;

found.forbidden = await failure(() => orders.getOrder("forbidden"));
found.throttled = await failure(() => orders.getOrder("throttled"));

const privateOrders = new OrdersSpApi.OrdersV0Api(client(OrdersSpApi, "private"));
found.buyer_by_setting = (await privateOrders.getOrders(marketplaces, time)).payload.orders[0].buyerInfo.buyerEmail;
console.log(JSON.stringify(found));
process.exit(0);
