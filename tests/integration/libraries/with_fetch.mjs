// Node's own fetch, without any library; prints what it got as JSON.
// OPEN is an address of the proxy at which the path names the account; that of `private` has data elements.

async function call(method, path, { account = "demo", token = "Atza|the-apps-old-token", body } = {}) {
  const headers = { "x-amz-access-token": token, ...(body ? { "content-type": "application/json" } : {}) };
  const address = `${process.env.OPEN}/@${account}/eu${path}`;
  return fetch(address, { method, headers, body: body && JSON.stringify(body) });
}
const read = async (...call_) => (await call(...call_)).json();
const failure = async (path) => {
  const answer = await call("GET", path);
  return [answer.status, (await answer.json()).errors[0].code];
};

const granted = await fetch(`${process.env.OPEN}/auth/o2/token`, {
  method: "POST",
  body: new URLSearchParams({
    grant_type: "refresh_token",
    refresh_token: "Atzr|the-apps-old-refresh-token",
    client_id: "the-apps-old-id",
    client_secret: "the-apps-old-secret",
  }),
});
const { access_token: token } = await granted.json();
const orders = "/orders/v0/orders?MarketplaceIds=A1PA6795UKMFR9&CreatedAfter=2026-01-01T00%3A00%3A00Z";
let page = (await read("GET", orders, { token })).payload;
const found = { orders: page.Orders.map((order) => order.AmazonOrderId), pages: 1 };
while (page.NextToken) {
  page = (await read("GET", `${orders}&NextToken=${encodeURIComponent(page.NextToken)}`)).payload;
  found.pages += 1;
}
found.destinations = (await read("GET", "/notifications/v1/destinations")).payload.length;

found.city = (await read("GET", "/orders/v0/orders/902-1/address")).payload.ShippingAddress.City;
const asked = { restrictedResources: [{ method: "GET", path: "/orders/v0/orders", dataElements: ["buyerInfo"] }] };
const minted = (await read("POST", "/tokens/2021-03-01/restrictedDataToken", { body: asked })).restrictedDataToken;
const restricted = (await read("GET", orders, { token: minted })).payload.Orders[0];
found.buyer_by_token = restricted.BuyerInfo.BuyerEmail;
found.address_by_token = "ShippingAddress" in restricted;

const contentType = "text/xml; charset=UTF-8";
found.document = (await read("POST", "/feeds/2021-06-30/documents", { body: { contentType } })).feedDocumentId;
const feed = {
  feedType: "POST_PRODUCT_DATA",
  marketplaceIds: ["A1PA6795UKMFR9"],
  inputFeedDocumentId: found.document,
};
found.feed = (await read("POST", "/feeds/2021-06-30/feeds", { body: feed })).feedId;

found.forbidden = await failure("/orders/v0/orders/forbidden");
found.throttled = await failure("/orders/v0/orders/throttled");

found.buyer_by_setting = (await read("GET", orders, { account: "private" })).payload.Orders[0].BuyerInfo.BuyerEmail;
console.log(JSON.stringify(found));
