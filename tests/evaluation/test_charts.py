"""Charts as SVG, and their axes."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from diffusion.evaluation import charts
from diffusion.evaluation.charts import Chart, Line

ROWS = [{"t": t, "model": 0.5 / (t + 1), "wiener": 0.6 / (t + 1), "zero": 1.0} for t in range(5)]


def test_a_chart_takes_its_colours_and_font_from_the_page() -> None:
    drawn = charts.svg(charts.mse_by_t({"model": ROWS}))
    assert any(_elements(drawn))
    assert drawn.startswith("<svg")
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)
    assert "currentColor" in drawn
    for variable in ("--grid", "--series-0", "--series-1", "--series-2"):
        assert f"var({variable})" in drawn
    assert "http" not in drawn
    assert "font-family" not in drawn
    assert ">timestep t</text>" in drawn
    assert re.match(r'<svg viewBox="0 0 [\d.]+ [\d.]+"', drawn)


def test_a_chart_is_the_same_each_time() -> None:
    chart = charts.mse_by_t({"model": ROWS})
    assert charts.svg(chart) == charts.svg(chart)


def test_charts_on_one_page_share_no_ids_of_different_things() -> None:
    drawn = [charts.svg(Chart("x", "y", (Line("a", [0, 1], [1, top]),))) for top in (2, 3000)]
    one, two = ({each.attrib["id"]: each for each in _elements(text) if "id" in each.attrib} for text in drawn)
    assert one
    for name in one.keys() & two.keys():  # named by a hash of what they are
        assert ElementTree.tostring(one[name]).split() == ElementTree.tostring(two[name]).split()


def _elements(drawn: str) -> Iterator[ElementTree.Element]:
    return ElementTree.fromstring(drawn.replace("xlink:href", "href")).iter()


def test_one_run_is_beside_the_baselines_several_are_beside_each_other() -> None:
    alone = charts.mse_by_t({"model": ROWS})
    assert [line.label for line in alone.lines] == ["model", "linear Wiener denoiser", "predicting zero"]
    assert list(alone.lines[1].y) == [row["wiener"] for row in ROWS]
    several = charts.mse_by_t({"a": ROWS, "b": ROWS[:2]})
    assert [(line.label, line.colour, len(line.x)) for line in several.lines] == [("a", 0, 5), ("b", 1, 2)]


def test_more_runs_than_colours_are_told_apart_by_dashes() -> None:
    runs = {f"run {number}": [{"t": 0, "step": 0, "model": 0.1, "mse": 0.1}] for number in range(charts.COLOURS + 1)}
    assert [line.style for line in charts.mse_by_t(runs).lines] == [*["-"] * charts.COLOURS, "--"]
    chart = charts.heldout(runs)
    assert [line.style for line in chart.lines] == [*["o-"] * charts.COLOURS, "o--"]
    assert "stroke-dasharray" in charts.svg(chart)


def test_the_first_term_of_the_bound_is_at_one() -> None:
    chart = charts.vlb_by_t({"a": [{"t": t, "bits_per_dim": 1.0 + t} for t in range(3)]})
    assert list(chart.lines[0].x) == [1, 2, 3]
    assert list(chart.lines[0].y) == [1, 2, 3]
    assert chart.log_x


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.037, 0.64, ["0.04", "0.06", "0.1", "0.2", "0.4", "0.6"]),
        (0.28, 1.05, ["0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]),
        (0.065, 0.0745, ["0.066", "0.068", "0.07", "0.072", "0.074"]),
        (0.0005, 20, ["0.001", "0.01", "0.1", "1", "10"]),
        (1, 1000, ["1", "2", "5", "10", "20", "50", "100", "200", "500", "1000"]),
    ],
)
def test_log_axes_have_plain_decimals(low: float, high: float, labels: list[str]) -> None:
    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    charts.decimal_ticks(axes.yaxis)
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [label.get_text() for value, label in ticks if low <= value <= high] == labels
    assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))
