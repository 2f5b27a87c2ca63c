// amazon-sp-api (npm) as apps use it, moved to the proxy by an agent; prints what it got as JSON.
// PLAIN and PRIVATE are addresses of the proxy, the second one's account with data elements.

import https from "node:https";
import net from "node:net";
import { SellingPartner } from "amazon-sp-api";

// The whole of the move: the library speaks to Amazon's names; this agent takes what it says to the proxy instead.
class ProxyAgent extends https.Agent {
  constructor(address) {
    super({ keepAlive: true });
    this.proxy = new URL(address);
  }

  createConnection(options, connected) {
    const isAmazons = /^((sandbox\.)?sellingpartnerapi-(na|eu|fe)|api)\.amazon\.com$/.test(options.host);
    if (!isAmazons) return super.createConnection(options, connected);
    return net.connect(Number(this.proxy.port), this.proxy.hostname);
  }
}

function client(address) {
  const sellingPartner = new SellingPartner({
    region: "eu",
    refresh_token: "Atzr|the-apps-old-refresh-token",
    credentials: {
      SELLING_PARTNER_APP_CLIENT_ID: "the-apps-old-id",
      SELLING_PARTNER_APP_CLIENT_SECRET: "the-apps-old-secret",
    },
    options: {
      https_proxy_agent: new ProxyAgent(address),
      auto_request_throttled: false,
    },
  });
  return sellingPartner;
}

async function failure(call) {
  const answer = await call({ raw_result: true });
  return [answer.statusCode, JSON.parse(answer.body).errors[0].code];
}

const time = { CreatedAfter: "2026-01-01T00:00:00Z", MarketplaceIds: "A1PA6795UKMFR9" };
const plain = client(process.env.PLAIN);
const getOrders = (from, query, more = {}) =>
  from.callAPI({ operation: "getOrders", endpoint: "orders", query, options: { version: "v0" }, ...more });
const getOrder = (orderId, options) =>
  plain.callAPI({ operation: "getOrder", endpoint: "orders", path: { orderId }, options: { version: "v0", ...options } });

let page = await getOrders(plain, time);
const found = { orders: page.Orders.map((order) => order.AmazonOrderId), pages: 1 };
while (page.NextToken) {
  page = await getOrders(plain, { ...time, NextToken: page.NextToken });
  found.pages += 1;
}
found.destinations = (await plain.callAPI({ operation: "notifications.getDestinations" })).length;

const address = { operation: "getOrderAddress", endpoint: "orders", path: { orderId: "902-1" } };
found.city = (await plain.callAPI({ ...address, options: { version: "v0" } })).ShippingAddress.City;
const { restrictedDataToken } = await plain.callAPI({
  operation: "tokens.createRestrictedDataToken",
  body: { restrictedResources: [{ method: "GET", path: "/orders/v0/orders", dataElements: ["buyerInfo"] }] },
});
const restricted = (await getOrders(plain, time, { restricted_data_token: restrictedDataToken })).Orders[0];
found.buyer_by_token = restricted.BuyerInfo.BuyerEmail;
found.address_by_token = "ShippingAddress" in restricted;

const contentType = "text/xml; charset=UTF-8";
found.document = (
  await plain.callAPI({ operation: "feeds.createFeedDocument", body: { contentType } })
).feedDocumentId;
found.feed = (
  await plain.callAPI({
    operation: "feeds.createFeed",
    body: { feedType: "POST_PRODUCT_DATA", marketplaceIds: ["A1PA6795UKMFR9"], inputFeedDocumentId: found.document },
  })
).feedId;

found.forbidden = await failure((options) => getOrder("forbidden", options));
found.throttled = await failure((options) => getOrder("throttled", options));

const first = (await getOrders(client(process.env.PRIVATE), time)).Orders[0];
found.buyer_by_setting = first.BuyerInfo.BuyerEmail;
console.log(JSON.stringify(found));
process.exit(0);
