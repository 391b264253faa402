import re
import xml.etree.ElementTree as ET

import pytest

from quantkit.report import svg


def show(value: float) -> str:
    return f"{value:.3g}"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0173), (0, 97), (0, 3e9), (0, 1e-12)])
def test_ticks_are_few_and_cover(low: float, high: float):
    found = svg.ticks(low, high)
    assert 3 <= len(found) <= 6
    assert found[0] == low
    assert found[-1] >= high * (1 - 1e-9)


@pytest.mark.parametrize(("low", "high"), [(1, 12), (0.3, 500), (2e-5, 3e4), (1, 10.5)])
def test_log_ticks_cover(low: float, high: float):
    found = svg.log_ticks(low, high)
    assert found[0] <= low * (1 + 1e-9)
    assert found[-1] >= high * (1 - 1e-9)
    assert len(found) <= 12


def test_a_bar_is_as_high_as_its_value():
    root = ET.fromstring(svg.bars([1.0, 2.0, None, 4.0], show, label="a < b"))
    heights = [float(r.get("height")) for r in root.iter("rect")]
    assert len(heights) == 3
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.01)
    assert heights[2] / heights[0] == pytest.approx(4, rel=0.01)
    assert root.get("aria-label") == "a < b"


@pytest.mark.parametrize("top", [3.0, 3000.0])
def test_lines_stay_within_their_picture(top: float):
    root = ET.fromstring(svg.lines({"a": [1.0, top, 2.0], "b": [2.0, None, 1.0]}, show, label="l"))
    width, height = (float(v) for v in root.get("viewBox").split()[2:])
    points = [p for line in root.iter("polyline") for p in line.get("points").split()]
    assert len(points) == 5
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 < x < width
        assert 0 < y < height


def test_the_darker_the_larger():
    root = ET.fromstring(svg.heat({"q": [1.0, 2.0], "k": [3.0, None]}, show, label="h"))
    shades = [float(r.get("fill-opacity")) for r in root.iter("rect")]
    assert shades == sorted(shades)
    assert len(set(shades)) == 3
    # What differs by next to nothing must not look different.
    root = ET.fromstring(svg.heat({"q": [4.125, 4.126]}, show, label="h"))
    assert len({r.get("fill-opacity") for r in root.iter("rect")}) == 1


def test_all_of_nothing():
    for picture in (
        svg.bars([0.0, 0.0], show, label="x"),
        svg.lines({"a": [0.0]}, show, label="x"),
        svg.heat({"a": [0.0]}, show, label="x"),
        svg.shares({"a": 0.0}, show, label="x"),
        svg.beside([("a", 0.0, None, "0")], label="x"),
    ):
        ET.fromstring(picture)
        assert not re.search(r"\b(nan|inf)\b", picture)


def test_shares_add_up():
    root = ET.fromstring(svg.shares({"b": 1.0, "a": 3.0}, show, label="s"))
    parts = [float(r.get("width")) for r in root.iter("rect") if r.get("height") == "30"]
    assert parts[0] / parts[1] == pytest.approx(3, rel=0.01)
