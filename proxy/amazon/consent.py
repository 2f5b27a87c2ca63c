"""The OAuth consent of a selling partner (DOC "Website Authorization Workflow").

The consent page is on Seller Central or Vendor Central of the selling partner's own marketplace. It redirects the
browser to the redirect URI that the application is registered with. An authorisation is valid for a whole region.
"""

import hmac
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from proxy.config import Region, Secret

CODE_LIFETIME = 300.0  # seconds in which an authorization code can be exchanged

_CONSENT = "/apps/authorize/consent"
_MAX_REDIRECT = 8192  # characters
_CODE = re.compile(r"[A-Za-z0-9._~-]{1,512}", re.ASCII)
_ERROR = re.compile(r"[a-z_]{1,40}", re.ASCII)
_SELLING_PARTNER = re.compile(r"[A-Za-z0-9]{1,64}", re.ASCII)


class SellerCentral(NamedTuple):
    """The region of a marketplace, and the hosts of its Seller Central and Vendor Central."""

    region: Region
    seller: str
    vendor: str


_EUROPE = "sellercentral-europe.amazon.com"

# DOC "Seller Central URLs", DOC "Vendor Central URLs", by country code.
SELLER_CENTRALS: MappingProxyType[str, SellerCentral] = MappingProxyType(
    {
        "CA": SellerCentral("na", "sellercentral.amazon.ca", "vendorcentral.amazon.ca"),
        "US": SellerCentral("na", "sellercentral.amazon.com", "vendorcentral.amazon.com"),
        "MX": SellerCentral("na", "sellercentral.amazon.com.mx", "vendorcentral.amazon.com.mx"),
        "BR": SellerCentral("na", "sellercentral.amazon.com.br", "vendorcentral.amazon.com.br"),
        "IE": SellerCentral("eu", "sellercentral.amazon.ie", "vendorcentral.amazon.ie"),
        "ES": SellerCentral("eu", _EUROPE, "vendorcentral.amazon.es"),
        "UK": SellerCentral("eu", _EUROPE, "vendorcentral.amazon.co.uk"),
        "FR": SellerCentral("eu", _EUROPE, "vendorcentral.amazon.fr"),
        "BE": SellerCentral("eu", "sellercentral.amazon.com.be", "vendorcentral.amazon.com.be"),
        "NL": SellerCentral("eu", "sellercentral.amazon.nl", "vendorcentral.amazon.nl"),
        "DE": SellerCentral("eu", _EUROPE, "vendorcentral.amazon.de"),
        "IT": SellerCentral("eu", _EUROPE, "vendorcentral.amazon.it"),
        "SE": SellerCentral("eu", "sellercentral.amazon.se", "vendorcentral.amazon.se"),
        "ZA": SellerCentral("eu", "sellercentral.amazon.co.za", "vendorcentral.amazon.co.za"),
        "PL": SellerCentral("eu", "sellercentral.amazon.pl", "vendorcentral.amazon.pl"),
        "EG": SellerCentral("eu", "sellercentral.amazon.eg", "vendorcentral.amazon.me"),
        "TR": SellerCentral("eu", "sellercentral.amazon.com.tr", "vendorcentral.amazon.com.tr"),
        "SA": SellerCentral("eu", "sellercentral.amazon.sa", "vendorcentral.amazon.me"),
        "AE": SellerCentral("eu", "sellercentral.amazon.ae", "vendorcentral.amazon.me"),
        "IN": SellerCentral("eu", "sellercentral.amazon.in", "www.vendorcentral.in"),
        "SG": SellerCentral("fe", "sellercentral.amazon.sg", "vendorcentral.amazon.com.sg"),
        "AU": SellerCentral("fe", "sellercentral.amazon.com.au", "vendorcentral.amazon.com.au"),
        "JP": SellerCentral("fe", "sellercentral.amazon.co.jp", "vendorcentral.amazon.co.jp"),
    }
)


class NotAuthorised(Exception):
    """The redirect holds no authorisation; the message has cause and remedy and quotes nothing of the redirect."""


class WrongState(NotAuthorised):
    """The redirect does not belong to this request for consent."""


class Consent(NamedTuple):
    """A selling partner's consent: the authorization code and the selling partner's id."""

    code: Secret
    selling_partner: str


def seller_central_of(country: str) -> SellerCentral | None:
    """Return the entry of a country code, None for an unknown one; GB is accepted for UK."""
    code = country.upper()
    return SELLER_CENTRALS.get("UK" if code == "GB" else code)


def consent_url(central: str, application_id: str, state: str, redirect_uri: str | None, *, is_draft: bool) -> str:
    """Return the URL of the consent page; `central` is the base URL of Seller or Vendor Central.

    Without `redirect_uri` Amazon uses the first one that the application is registered with.
    """
    query = {"application_id": application_id, "state": state}
    if redirect_uri is not None:
        query["redirect_uri"] = redirect_uri
    if is_draft:
        query["version"] = "beta"
    return f"{central}{_CONSENT}?{urlencode(query)}"


def parse_redirect(redirect: str, state: str) -> Consent:
    """Return the consent in the URL of the redirect; raise NotAuthorised.

    `state` is compared before all else: a redirect that was forged (CSRF, RFC 6749 section 10.12) is not read further.
    """
    query = _query_of(redirect)
    if "amazon_callback_uri" in query and "state" not in query:
        raise WrongState(
            "this is the application's Login URI, which Amazon opens if the authorisation was started in the Appstore: "
            "start with the URL that authorize prints"
        )
    if not hmac.compare_digest(query.get("state", "").encode(), state.encode()):
        raise WrongState(
            "its state is not the one that was sent: paste the complete URL to which the last opened page redirected"
        )
    if "error" in query:
        error = query["error"] if _ERROR.fullmatch(query["error"]) else "an error"
        raise NotAuthorised(
            "the selling partner did not consent (access_denied): ask them, and start again"
            if error == "access_denied"
            else f"Amazon returned {error}: check the application in Amazon's developer console, and start again"
        )
    code = query.get("spapi_oauth_code", "")
    if not _CODE.fullmatch(code):
        raise NotAuthorised("it has no spapi_oauth_code: paste the complete URL; if it is complete, start again")
    selling_partner = query.get("selling_partner_id", "")
    return Consent(Secret(code), selling_partner if _SELLING_PARTNER.fullmatch(selling_partner) else "")


def _query_of(redirect: str) -> Mapping[str, str]:
    """Return the query parameters of a URL without those that occur twice, which RFC 6749 section 3.1 forbids."""
    if not redirect.isascii():
        raise WrongState("it is not a URL")
    if len(redirect) > _MAX_REDIRECT:
        raise WrongState("it is too long to be a redirect of Amazon")
    try:
        pairs = parse_qsl(urlsplit(redirect.strip()).query, keep_blank_values=True, max_num_fields=32)
    except ValueError:
        raise WrongState("it is not a URL") from None
    names = [name for name, _ in pairs]
    return {name: value for name, value in pairs if names.count(name) == 1}
