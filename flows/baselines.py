"""The verdict on a model's likelihood, without torch, which the terminal does not need."""

from collections.abc import Mapping

LABELS = {
    "uniform": "a uniform distribution over the values present",
    "histogram": "the histogram of all pixels",
    "pixel_histogram": "the histogram of each pixel",
}
"""Of the baselines in `diffusion.evaluation.histograms`."""


def verdict(report: Mapping[str, float]) -> str:
    """Whether the model is better than the best baseline, in words."""
    best = min(LABELS, key=lambda name: report[f"bits_per_dim_{name}"])
    if report["bits_per_dim_gain_low"] > 0:
        word = "better than"
    elif report["bits_per_dim_gain_high"] < 0:
        word = "worse than"
    else:
        word = "no different, within its noise, from"
    return f"{word} {LABELS[best]} ({report[f'bits_per_dim_{best}']:.4f})"
