"""Parts of the benchmarks that otherwise only a long run would test."""

import argparse

import pytest

from proxy.amazon.operations import load_table
from tests.bench import instructions, memory_growth, throughput
from tests.bench.bulk import framing_of
from tests.bench.operations_upstream import filler, minted, response_with
from tests.bench.upstream import RESPONSE_SIZE


def test_every_operation_has_a_path_that_is_matched_to_it() -> None:
    table = load_table()
    for operation in table:
        found = table.match(operation.method, memory_growth.path_of(operation))
        assert found is not None
        assert (found.method, found.template) == (operation.method, operation.template)


@pytest.mark.parametrize("size", [900, 31_500, 32_768])
def test_filler_has_the_size_that_was_asked_for(size: int) -> None:
    assert len(filler(size)) == size
    assert len(filler(size, size).splitlines()) == 1


def test_every_response_has_a_body_of_the_same_size() -> None:
    for response in (response_with(0), response_with(1024), minted()):
        head, _, body = response.partition(b"\r\n\r\n")
        assert len(body) == RESPONSE_SIZE
        assert b"\r\nContent-Length: 2048" in head
    assert len(response_with(1024)) == len(response_with(0)) + 1024


def test_output_of_perf_without_a_count_is_none() -> None:
    assert instructions.parse_count("123456,,instructions:u,1000,100.00,,\n") == 123456
    assert instructions.parse_count("<not supported>,,instructions:u,0,100.00,,\n") is None
    assert instructions.parse_count("") is None


def test_the_framing_is_read_from_the_head() -> None:
    assert framing_of(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked") == "chunked"
    assert framing_of(b"HTTP/1.1 200 OK\r\nContent-Length: 5") == "length"


def test_costs_are_compared_with_the_smallest_case_of_the_kind() -> None:
    cases = [memory_growth.Case("kind", "one", 1, []), memory_growth.Case("kind", "many", 1, [])]
    costs = {"one": [memory_growth.Cost(100, None, 10, 1, {})], "many": [memory_growth.Cost(150, None, 10, 1, {})]}
    lines = memory_growth.table(cases, costs, argparse.Namespace(rounds=1, seconds=1, connections=1))
    assert lines[-1] == "| kind | many | 150 (1.50) | not counted | 10 | 100% |"


def test_less_than_half_of_the_peers_throughput_is_reported() -> None:
    speeds = [
        throughput.Speed(proxy, way, 100, seconds, 1.0, 0.0, "")
        for way in throughput.WAYS
        for proxy, seconds in (("sp-api-proxy", 3.0), ("nginx", 1.0))
    ]
    assert len(throughput.missed(speeds)) == len(throughput.WAYS)
    assert throughput.missed([speed for speed in speeds if speed.proxy != "nginx"]) == []
