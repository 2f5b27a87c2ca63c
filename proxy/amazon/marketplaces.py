"""Regions of marketplaces and hosts of regions (DOC "Marketplace IDs", "SP-API Endpoints")."""

from types import MappingProxyType

from proxy.config import Environment, Region

MARKETPLACES: MappingProxyType[str, Region] = MappingProxyType(
    {
        "A2EUQ1WTGCTBG2": "na",  # Canada
        "ATVPDKIKX0DER": "na",  # United States
        "A1AM78C64UM0Y8": "na",  # Mexico
        "A2Q3Y263D00KWC": "na",  # Brazil
        "A28R8C7NBKEWEA": "eu",  # Ireland
        "A1RKKUPIHCS9HS": "eu",  # Spain
        "A1F83G8C2ARO7P": "eu",  # United Kingdom
        "A13V1IB3VIYZZH": "eu",  # France
        "AMEN7PMS3EDWL": "eu",  # Belgium
        "A1805IZSGTT6HS": "eu",  # Netherlands
        "A1PA6795UKMFR9": "eu",  # Germany
        "APJ6JRA9NG5V4": "eu",  # Italy
        "A2NODRKZP88ZB9": "eu",  # Sweden
        "AE08WJ6YKNBMC": "eu",  # South Africa
        "A1C3SOZRARQ6R3": "eu",  # Poland
        "ARBP9OOSHTCHU": "eu",  # Egypt
        "A33AVAJ2PDY3EV": "eu",  # Türkiye
        "A17E79C6D8DWNP": "eu",  # Saudi Arabia
        "A2VIGQ35RCS4UG": "eu",  # United Arab Emirates
        "A21TJRUUN4KGV": "eu",  # India
        "A19VAU5U5O7RUS": "fe",  # Singapore
        "A39IBJ37TRP1C6": "fe",  # Australia
        "A1VC38T7YXB528": "fe",  # Japan
    }
)

# All spellings of the query parameter in Amazon's models.
MARKETPLACE_PARAMETERS = frozenset({"marketplaceId", "marketplaceIds", "MarketplaceId", "MarketplaceIds"})

HOSTS: MappingProxyType[tuple[Environment, Region], str] = MappingProxyType(
    {
        ("production", "na"): "sellingpartnerapi-na.amazon.com",
        ("production", "eu"): "sellingpartnerapi-eu.amazon.com",
        ("production", "fe"): "sellingpartnerapi-fe.amazon.com",
        ("sandbox", "na"): "sandbox.sellingpartnerapi-na.amazon.com",
        ("sandbox", "eu"): "sandbox.sellingpartnerapi-eu.amazon.com",
        ("sandbox", "fe"): "sandbox.sellingpartnerapi-fe.amazon.com",
    }
)
HOST_REGION: MappingProxyType[str, tuple[Environment, Region]] = MappingProxyType(
    {host: meaning for meaning, host in HOSTS.items()}
)
