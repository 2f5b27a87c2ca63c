"""SVG charts of the benchmark."""

from xml.etree import ElementTree as ET

from tests.bench.plot import Group, svg

_SVG = "{http://www.w3.org/2000/svg}"


def test_bars_are_in_proportion_and_texts_are_escaped() -> None:
    rows = [("ours", (10.0, 20.0)), ("a < b", (40.0, 30.0))]
    text = svg("Title & more", "What <it> shows", "ours", [Group("CPU", ("many", "one"), ",.0f", rows)])
    root = ET.fromstring(text)
    assert root.findtext(f"{_SVG}title") == "Title & more"
    assert root.findtext(f"{_SVG}desc") == "What <it> shows"
    bars = [
        (bar.get("class"), float(bar.get("width", ""))) for bar in root.iter(f"{_SVG}rect") if bar.get("x") == "118"
    ]
    assert [kind for kind, _ in bars] == ["o", "p", "q", "r"]
    widest = bars[2][1]
    assert [round(width / widest, 2) for _, width in bars] == [0.25, 0.5, 1.0, 0.75]
    assert "a < b" in [element.text for element in root.iter(f"{_SVG}text")]


def test_the_svg_is_small() -> None:
    rows = [(name, (123.4, 1234.5)) for name in ("sp-api-proxy", "Envoy", "nginx", "Caddy", "bare aiohttp")]
    groups = [Group("CPU time per request", ("32 connections", "1 connection"), ",.0f", rows)] * 2
    assert len(svg("Title", "Description", "sp-api-proxy", groups).encode()) < 10_000
