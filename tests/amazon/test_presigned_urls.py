"""Presigned URLs: where answers hold them, whose hosts they may lead to, how long they last."""

import json
from typing import Any

import pytest

from proxy.amazon.operations import load_table
from proxy.amazon.presigned_urls import (
    DEFAULT_LIFETIME,
    URL_LOCATIONS,
    is_storage,
    lifetime,
    parse,
    signed_headers,
    urls_in,
)
from tests.conftest import MODELS, needs

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    "host",
    [
        # As they stand in public repositories and in Amazon's models and guides.
        "tortuga-prod-na.s3.amazonaws.com",
        "tortuga-prod-na.s3-external-1.amazonaws.com",
        "tortuga-prod-eu.s3-eu-west-1.amazonaws.com",
        "tortuga-prod-fe.s3.us-west-2.amazonaws.com",
        "invoicesdocumentbucket.s3.eu-east-1.amazonaws.com",
        "s3.amazonaws.com",
        "s3.ap-northeast-1.amazonaws.com",
        "bucket.with.dots.s3.dualstack.us-gov-west-1.amazonaws.com",
        "bucket.s3-accelerate.amazonaws.com",
        "d34o8swod1owfl.cloudfront.net",
    ],
)
def test_amazons_storage_is_known(host: str) -> None:
    assert is_storage(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "amazonaws.com",
        "s3.amazonaws.com.evil.test",
        "evils3.amazonaws.com",
        "x-s3.amazonaws.com",
        "s3.evil.amazonaws.com",
        "s3.us-east-1.elb.amazonaws.com",
        "s3-website-us-east-1.amazonaws.com",
        "bucket.s3-website.eu-central-1.amazonaws.com",
        "ec2-1-2-3-4.compute-1.amazonaws.com",
        "bucket.s3.us-east-1.amazonaws.com.cn",
        "other.cloudfront.net",
        "-.s3.amazonaws.com",
        ".s3.amazonaws.com",
        "bücket.s3.amazonaws.com",
        "169.254.169.254",
        "localhost",
    ],
)
def test_any_other_host_is_not(host: str) -> None:
    assert not is_storage(host)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3.amazonaws.com/a",
        "ftp://s3.amazonaws.com/a",
        "https:///a",
        "https://user@s3.amazonaws.com/a",
        "https://s3.amazonaws.com\\@evil.test/a",
        "https://s3.amazonaws.com/a#b",
        "https://s3.amazonaws.com/a b",
        "https://s3.amazonaws.com/a\r\nx: y",
        "https://s3.amazonaws.com/ä",
        "https://s3.amazonaws.com:0/a",
        "https://s3.amazonaws.com:99999/a",
        "https://[::1/a",
    ],
)
def test_what_cannot_be_sent_on_as_it_is_written_is_no_url(url: str) -> None:
    assert parse(url) is None


def test_a_url_keeps_its_bytes() -> None:
    parts = parse("https://s3.amazonaws.com/bucket/%2Fninety/../a%7e?X-Amz-Signature=%2b&x=")
    assert parts is not None
    assert (parts.path, parts.query) == ("/bucket/%2Fninety/../a%7e", "X-Amz-Signature=%2b&x=")


@pytest.mark.parametrize(
    ("query", "life"),
    [
        ("X-Amz-Date=20260101T000000Z&X-Amz-Expires=300", 300),
        ("x-amz-expires=30", 30),
        (f"AWSAccessKeyId=A&Expires={NOW + 120:.0f}&Signature=S", 120),
        (f"Expires={NOW - 1:.0f}", 0),
        ("X-Amz-Expires=-5", DEFAULT_LIFETIME),
        ("X-Amz-Expires=٣", DEFAULT_LIFETIME),
        ("X-Amz-Expires=9999999999999", DEFAULT_LIFETIME),
        ("", DEFAULT_LIFETIME),
    ],
)
def test_a_url_says_how_long_it_lasts(query: str, life: float) -> None:
    assert lifetime(query, NOW) == life


def test_a_url_says_what_its_signature_covers() -> None:
    query = "X-Amz-SignedHeaders=Content-MD5%3Bhost%3Bx-amz-server-side-encryption&X-Amz-Expires=900"
    assert signed_headers(query) == {"content-md5", "host", "x-amz-server-side-encryption"}
    assert signed_headers("Expires=1") == frozenset()


def test_every_place_is_of_an_operation_of_the_table() -> None:
    operations = {operation.name: operation for operation in load_table()}
    assert URL_LOCATIONS.keys() <= operations.keys()


@pytest.mark.parametrize("content", [None, 5, [], {"url": 5}, {"url": ["https://a"]}, {"payload": []}, "https://a"])
def test_a_response_of_another_form_holds_no_url(content: Any) -> None:
    assert not [url for place in URL_LOCATIONS.values() for url in urls_in(content, place.keys)]


# Held to the models, where they are at hand.

_NOT_PRESIGNED = {
    # What is there is a page, a picture for everybody, a path of the API itself, or on a host of its own.
    *(
        "imageUrl",
        "carrierURL",
        "rmaPageURL",
        "trackingUrl",
        "uri",
        "href",
        "resource",
        "CustomizedURL",
        "customizedUrl",
    ),
    "deliveryPhotoUrl",
}


def test_every_url_of_the_models_is_at_a_place_or_known_to_be_something_else() -> None:
    needs(MODELS.is_dir(), "Amazon's models")
    ends = {place.keys[-1] for place in URL_LOCATIONS.values()}
    missing = set()
    for path in MODELS.rglob("*.json"):
        definitions = json.loads(path.read_text(encoding="utf-8")).get("definitions") or {}
        for definition in definitions.values():
            for name in definition.get("properties") or {}:
                if name.lower().endswith(("url", "uri", "href")) and name not in ends | _NOT_PRESIGNED:
                    missing.add((path.name, name))
    assert not missing
