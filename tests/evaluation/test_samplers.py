"""Settings of sampling compared."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusion.evaluation import charts, samplers, sets
from diffusion.evaluation.quality import COMPARED, Figure
from diffusion.evaluation.samplers import Drawn
from diffusion.model import Model
from diffusion.nn.unet import UNetOptions
from diffusion.sampling.build import SampleOptions

CPU = torch.device("cpu")
LABELS = np.array([1, 0, -1, 1, 1])


@pytest.fixture
def model() -> Model:
    net = UNetOptions(base_channels=8, channel_multipliers=(1,), attention_levels=(), classes=True)
    return Model.new((1, 8, 8), net, classes=("a", "b"))


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({"steps": 5}, 5),
        ({"sampler": "ddpm", "steps": 3}, 3),
        ({"sampler": "ddim", "steps": 4, "guidance": 2.0}, 8),  # with and without the class
        # Timesteps 0, 200, 400, 600, 800 and 999: one for the first, from pure noise, and the last, otherwise two.
        ({"sampler": "heun", "steps": 6, "spacing": "linspace"}, 6 * 2 - 2),
    ],
)
def test_the_evaluations_of_the_network_are_counted(
    model: Model, options: dict[str, Any], evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "BATCH", 2)
    given, steps = SampleOptions(variance="fixed-small", **options), []
    drawn = samplers.draw(model, given, 3, CPU, LABELS, lambda: steps.append(1))
    assert drawn.evaluations == evaluations
    assert len(steps) == 3 * given.steps
    assert drawn.options == given
    np.testing.assert_array_equal(drawn.samples.pixels, sets.samples(model, given, 3, CPU, LABELS).pixels)
    assert not model.net._forward_pre_hooks


def rows(*settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A table of these settings; the figures of the n-th are n, n + 1, ..., each ± 0.5."""
    images = sets.Images(np.zeros((7, 1, 8, 8), np.uint8), np.zeros(7, np.int64))
    drawn = [Drawn(SampleOptions(**setting), images, 2 * n) for n, setting in enumerate(settings)]
    figures = [
        [
            Figure(metric, "own features", "samples", n + k, n + k - 0.5, n + k + 0.5, 7)
            for k, metric in enumerate(COMPARED)
        ]
        for n in range(len(settings))
    ]
    return samplers.table(drawn, figures)


def test_the_table_names_what_differs() -> None:
    one, two, three = rows({}, {"sampler": {"kind": "ddim", "eta": 0.5}, "steps": 10, "guidance": 3.0}, {"steps": 5})
    assert one == {
        "sampler": "dpm-solver++-sde", "spacing": "log-snr", "guidance": 1.0, "steps": 50, "evaluations": 0,
        "frechet_distance": 0, "frechet_distance_low": -0.5, "frechet_distance_high": 0.5,
        "kid": 1, "kid_low": 0.5, "kid_high": 1.5, "precision": 2, "precision_low": 1.5, "precision_high": 2.5,
        "recall": 3, "recall_low": 2.5, "recall_high": 3.5, "density": 4, "density_low": 3.5, "density_high": 4.5,
        "coverage": 5, "coverage_low": 4.5, "coverage_high": 5.5, "n": 7, "features": "own features",
    }  # fmt: skip
    assert (two["sampler"], two["guidance"], two["steps"], two["evaluations"]) == ("ddim (eta 0.5)", 3, 10, 2)
    assert (two["frechet_distance"], three["coverage"]) == (1, 7)
    assert list(one) == list(two) == list(three)
    assert "variance" in rows({}, {"variance": "fixed-large"})[0]
    assert rows({"sampler": "ddim"})[0]["sampler"] == "ddim"
    few = rows({"sampler": "consistency", "spacing": "angle"}, {"sampler": {"kind": "consistency", "gamma": 1}})
    assert [row["sampler"] for row in few] == ["consistency", "consistency (gamma 1)"]


def test_settings_in_words() -> None:
    assert samplers.settings(rows({}, {"sampler": "ddim"})) == ["dpm-solver++-sde", "ddim"]
    different = rows({}, {"spacing": "linspace", "guidance": 2.5, "threshold": "none"})
    assert samplers.settings(different) == [
        "dpm-solver++-sde, log-snr, threshold clip, guidance 1",
        "dpm-solver++-sde, linspace, threshold none, guidance 2.5",
    ]


def test_a_chart_has_a_line_for_each_setting_in_the_order_of_the_steps() -> None:
    table = rows({"steps": 10}, {"sampler": "ddim", "steps": 8}, {"steps": 5})
    chart = samplers.chart(table, "coverage")
    assert [(line.label, line.colour) for line in chart.lines] == [("dpm-solver++-sde", 0), ("ddim", 1)]
    assert chart.lines[0][1:3] == ([5, 10], [7, 5])
    assert (chart.lines[0].low, chart.lines[0].high) == ([6.5, 4.5], [7.5, 5.5])
    assert (chart.x, chart.y, chart.log_y) == ("sampling steps", "coverage", False)
    assert not samplers.chart(table, "frechet_distance").log_y  # one interval reaches zero
    assert samplers.chart(table[1:], "frechet_distance").log_y


def test_intervals_are_drawn() -> None:
    chart = samplers.chart(rows({"steps": 10}, {"steps": 5}), "coverage")
    plain = without_intervals(chart)
    assert charts.svg(chart).count("LineCollection") == 1
    assert "LineCollection" not in charts.svg(plain)


def without_intervals(chart: charts.Chart) -> charts.Chart:
    return chart._replace(lines=tuple(line._replace(low=(), high=()) for line in chart.lines))
