"""The report."""

import pytest
from matplotlib.figure import Figure

from diffusion.evaluation import charts
from diffusion.sampling.build import SampleOptions
from flows.stages import evaluate

NAMES = ("mse", "rmse", "mae", "r2", "bits_per_dim", "bits_per_dim_exact")
ENDS = ("", "_low", "_high", "_se", "_images")
PICTURES = ("mse_by_t", "vlb_by_t", "samples", "filmstrip", "training")


def test_how_ancestral_samples_were_made() -> None:
    options = SampleOptions(sampler="ddpm", variance="analytic", steps=20, spacing="log-snr", threshold="dynamic")
    assert evaluate.describe(options, 7, num_classes=0) == (
        "Sampler ddpm, variance analytic, 20 steps, spacing log-snr, threshold dynamic, EMA weights, seed 7; uncurated."
    )


@pytest.mark.parametrize(
    ("changes", "classes", "words"),
    [
        ({"sampler": {"kind": "ddim", "eta": 0.5}}, 0, "Sampler ddim, eta 0.5, "),
        ({"sampler": "dpm-solver++-sde"}, 0, "Sampler dpm-solver++-sde, "),
        ({"guidance": 1.5}, 10, ", classes in turn with guidance 1.5, "),
    ],
)
def test_how_samples_were_made(changes: dict[str, object], classes: int, words: str) -> None:
    text = evaluate.describe(SampleOptions.model_validate(changes), 0, classes)
    assert words in text
    assert ("guidance" in text) == bool(classes)


def test_the_page_holds_all_figures_and_pictures() -> None:
    overall = {f"{name}{end}": 0.5 for name in NAMES for end in ENDS} | {
        "images": 3,
        "pairs": 6,
        "wiener_mse": 0.5,
        "zero_mse": 1.0,
        "val_mse": 0.1357,
        "val_mse_low": 0.1246,
        "val_mse_high": 0.1468,
        "bits_per_dim": 4.4321,
        "bits_per_dim_values": 17,
        "bits_per_dim_uniform": 4.0875,
        "bits_per_dim_histogram": 2.9817,
        "bits_per_dim_pixel_histogram": 2.4300,
        "bits_per_dim_gain_low": -2.1,
        "bits_per_dim_gain_high": -1.9,
        "bits_per_dim_exact_images": 16,
        "bits_per_dim_prior": 0.0123,
        "bits_per_dim_diffusion": 3.2109,
        "bits_per_dim_decoder": 1.2098,
    }
    page = report.page(
        overall, [], dict.fromkeys(PICTURES, b"png"), how="Somehow < 5", variance="analytic", resized="3 & 4 cropped"
    )
    assert "<p>3 &amp; 4 cropped</p>" in page
    for text in (
        "4.4321",
        "0.0123",
        "3.2109",
        "1.2098",
        "<td>16</td>",
        "Somehow &lt; 5",
        "reverse step: analytic;",
        "over the\n17 values",
    ):
        assert text in page
    assert "<strong>worse than the histogram of each pixel (2.4300)</strong>" in page
    for baseline in ("A uniform distribution", "4.0875", "The histogram of all pixels", "2.9817"):
        assert baseline in page
    assert page.count('src="data:image/png;base64,cG5n"') == len(PICTURES)


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
