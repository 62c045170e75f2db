"""Charts: whole SVG, in the page's colours, whose numbers are where they are said to be."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from pretrain.telemetry.numbers import compact
from pretrain.telemetry.report.charts import Band, Line, Point, area_chart, heat_chart, line_chart, scatter_chart

STEPS = list(range(0, 1000, 50))


def svg(figure):
    """Parsed: a chart that is no XML would be cut off where it breaks."""
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.DOTALL)[0].replace("xlink:", ""))


def every_chart():
    lines = [Line("a", STEPS, [s**0.5 for s in STEPS]), Line("b & <b>", STEPS, [float(s) for s in STEPS], 1)]
    yield line_chart("Lines", lines, unit="nats", zero=True)
    yield area_chart("Areas", lines, form=compact)
    yield scatter_chart(
        "Points", [Point("p", 1.0, 2.0, strong=True), Point("<q>", 3.0, 4.0)], x_label="x", paths=[[(1, 2), (3, 4)]]
    )
    yield heat_chart("Rows", ["layer 0", "layer 1"], STEPS, [[1.0 + s for s in STEPS], [2.0] * len(STEPS)])


def test_they_are_pictures_with_a_description_in_the_colours_of_the_page():
    for figure in every_chart():
        picture = svg(figure)
        assert picture.get("role") == "img"
        assert len(picture.get("aria-label")) > 15
        assert "var(--soft)" in figure
        assert not re.search(r"(fill|stroke): #", figure), "a fixed colour would be lost on one of two papers"
        assert "font-family" not in figure
        assert "<b>" not in figure


def test_a_legend_says_the_last_value():
    figure = line_chart("Loss", [Line("law", [1, 2, 3], [3.0, 2.5, None], 4)])
    assert '<span class="key" style="--key: var(--c4)">law 2.5</span>' in figure
    assert 'aria-label="Loss: law from 3 to 2.5"' in figure


def test_labels_are_whole():
    figure = line_chart("Learning rate", [Line("lr", [1, 2], [0.0, 0.001])], from_zero=True)
    labels = [text.text for text in svg(figure).iter("text")]
    assert {"0.00025", "0.0005", "0.00075"} <= set(labels)


def test_a_mark_under_the_pointer_lies_on_its_curve():
    figure = line_chart("Loss", [Line("a", [0, 10, 20], [5.0, 1.0, 3.0])], zero=True)
    marks = [(float(c.get("cx")), float(c.get("cy"))) for c in svg(figure).iter("circle")]
    curve = re.search(r'<path d="M ([\d. L\n]+)"[^>]*stroke: var\(--c0\)', figure)[1]
    points = [tuple(map(float, pair.split())) for pair in curve.split("L")]
    assert len(marks) == 3
    assert all(
        abs(a - b) < 0.2 for mark, point in zip(marks, points, strict=True) for a, b in zip(mark, point, strict=True)
    )


def test_a_column_names_the_lines_that_have_a_point_in_it():
    figure = line_chart("Loss", [Line("train", [0, 10, 20], [5.0, 1.0, 3.0]), Line("law", [0, 19], [2.0, 7.0], 1)])
    columns = [
        [text.text for text in column.iter("text")] for column in svg(figure).iter("g") if column.get("class") == "at"
    ]
    assert columns == [
        ["step 0", "train 5", "law 2"],
        ["step 10", "train 1"],
        ["step 19", "law 7"],
        ["step 20", "train 3"],
    ]


def test_nothing_is_drawn_of_nothing():
    assert line_chart("Loss", [Line("a", [], []), Line("b", [1], [None]), Line("c", [1], [float("nan")])]) == ""
    assert scatter_chart("Points", [Point("p", float("nan"), 1.0)], x_label="x") == ""
    assert heat_chart("Rows", [], [], []) == ""


def test_numbers_in_words():
    values = {
        0: "0",
        12_345: "12.3k",
        -3.4e6: "−3.4M",
        1e-5: "1e-05",
        -0.25: "−0.25",
        999.5: "1e+03",
        float("inf"): "—",
    }
    assert {v: compact(v) for v in values} == values


def test_bands_lie_under_the_stretch_of_the_curve_that_they_name():
    """The strip is cut to what the axes show; between two bands there is no gap."""
    lines = [Line("a", [0, 10, 20], [5.0, 1.0, 3.0])]
    figure = line_chart("Loss", lines, bands=[Band("from 0: <es>", 0, 10), Band("from 10", 10, 1000)])
    strips = [rect for rect in svg(figure).iter("rect") if rect.get("class") == "band"]
    assert [rect[0].text for rect in strips] == ["from 0: <es>", "from 10"]
    assert [rect.get("style") for rect in strips] == ["fill:var(--line)", "fill:var(--soft)"]
    marks = [float(c.get("cx")) for c in svg(figure).iter("circle")]
    edges = [(float(r.get("x")), float(r.get("x")) + float(r.get("width"))) for r in strips]
    assert edges[0][0] == pytest.approx(marks[0], abs=0.2)
    assert edges[0][1] == pytest.approx(marks[1], abs=0.2)
    assert edges[1][0] == pytest.approx(marks[1], abs=0.2)
    assert marks[2] < edges[1][1] < 440
    assert "band" in area_chart("Areas", lines, form=compact, bands=[Band("x", 0, 10)])
    assert "band" not in line_chart("Loss", lines, bands=[Band("later", 30, 40)])
