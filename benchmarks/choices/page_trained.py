"""The part of the page about trained models."""

from collections.abc import Iterator, Sequence

from choices import charts
from choices.results import Row
from choices.tables import BITS, QUALITY, TRAINED, Column, Entry, compared, grouped, held_out, made_by, table
from choices.training import DEFAULT, GROUPS, PAPERS

TEXTS = {
    "schedule": (
        "Noise schedule",
        "Compared with the default parameters (`process.schedule=cosine`). The last row changes two parameters; "
        "[Weighting](#weighting) shows what `snr-plus-one` does alone.",
    ),
    "parameterization": ("Parameterization", "Compared with the default parameters (`process.parameterization=v`)."),
    "weighting": ("Weighting", "Compared with the default parameters (`process.weighting=simple`)."),
    "timesteps": ("Training timesteps", "Compared with the default parameters (`train.timesteps=rms-error`)."),
    "network": (
        "Network",
        "Compared with the default parameters (a U-Net with 32 channels and `fourier_features=[3, 4]`). "
        "All are trained for as many steps, not for "
        "as long: the last columns show the number of weights and the CPU time of training.",
    ),
}
OBJECTIVES = {
    f"{PAPERS} process.parameterization={predicted} process.weighting={weighting}": fid
    for predicted, weighting, fid in (
        ("mu", "vlb-large", "13.22"),
        ("mu", "posterior-mean", "unstable"),
        ("eps", "vlb-large", "13.51"),
        ("eps", "simple", "3.17"),
    )
}
"""The variants of the group `objectives`, and the FID that Ho et al. 2020, table 2, has for them on CIFAR-10."""
LARGE = Column("bits_per_dim fixed-large", "bits/dim, variance beta_t", 3, -1)
IN_CHART = (BITS, QUALITY[0], QUALITY[-1])


def trained(rows: Sequence[Row], data: str, drawn: dict[str, bytes]) -> Iterator[str]:
    """The text about trained models; adds the chart to `drawn`."""
    yield f"## What needs training: {data}\n"
    yield "The default parameters with one change at a time, written as after `ddpm set`.\n"
    for steps, of_steps in grouped(rows, "steps").items():
        chart: list[Entry] = []
        by_group = grouped(of_steps, "group")
        default = by_group.get(DEFAULT, [])
        for name in TEXTS:
            if name in by_group:
                entries = _entries(by_group[name], default)
                chart += entries
                yield from _table(name, steps, entries, default)
        if chart and default:
            name = f"choosing-{data}-{steps}.svg"
            drawn[name] = charts.differences(
                [(entry.label.strip("`"), [compared(entry, column) for column in IN_CHART]) for entry in chart],
                IN_CHART,
            )
            yield f"### All differences after {steps} steps\n"
            yield f"![Differences to the default parameters, with intervals]({name})\n"
        if "variance" in by_group:
            yield from _variances(steps, by_group["variance"], default)
        if "objectives" in by_group:
            yield from _objectives(steps, by_group["objectives"])


def _entries(runs: Sequence[Row], default: Sequence[Row]) -> list[Entry]:
    order = GROUPS[runs[0]["group"]]
    variants = grouped(runs, "variant")
    known = sorted(variants, key=lambda variant: order.index(variant) if variant in order else len(order))
    return [Entry(f"`{variant}`", variants[variant], default) for variant in known]


def _table(name: str, steps: int, entries: Sequence[Entry], default: Sequence[Row]) -> Iterator[str]:
    heading, text = TEXTS[name]
    columns = [column for column in TRAINED if name != "schedule" or column.name != "mse"]
    costs = ["weights", "CPU s"] if name == "network" else []
    shown = [Entry("*default*", default), *entries]
    if costs:
        shown = [entry._replace(more=_costs(entry.runs)) for entry in shown]
    runs = [*default, *(run for entry in entries for run in entry.runs)]
    yield f"### {heading}\n\n{text}\n\n{table(['changed', *costs], [*shown, held_out(runs, len(costs))], columns)}\n"
    yield made_by(f"train --only {DEFAULT} {name} --steps {steps}", runs)


def _costs(runs: Sequence[Row]) -> tuple[str, ...]:
    seconds = [run["cpu_seconds"] for run in runs if "cpu_seconds" in run]
    return (f"{runs[0]['parameters']:,}", f"{sum(seconds) / len(seconds):.0f}") if seconds else ("", "")


def _variances(steps: int, learned: Sequence[Row], default: Sequence[Row]) -> Iterator[str]:
    def entry(label: str, runs: Sequence[Row], name: str) -> Entry:
        against = () if runs is default and name == "analytic" else default
        return Entry(label, runs, against, names={BITS.name: f"bits_per_dim {name}"})

    entries = [entry(f"`{name}`", default, name) for name in ("analytic", "fixed-small", "fixed-large")]
    for name in ("analytic", "learned"):
        entries.append(entry(f"`{name}`, trained with `process.learned_variance=true`", learned, name))
    yield (
        "### Variance of the reverse step\n\n`sample.variance` does not need another training, except for the last two "
        f"rows. Compared with `analytic` and the default parameters.\n\n{table(['variance'], entries, [BITS])}\n"
    )
    yield made_by(f"train --only {DEFAULT} variance --steps {steps}", [*default, *learned])


def _objectives(steps: int, runs: Sequence[Row]) -> Iterator[str]:
    variants = grouped(runs, "variant")
    *_, simple = OBJECTIVES
    entries = []
    for variant, fid in OBJECTIVES.items():
        against = () if variant == simple else variants.get(simple, ())
        label = variant.removeprefix(f"{PAPERS} ")
        entries.append(Entry(f"`{label}`", variants.get(variant, ()), against, (fid,)))
    yield (
        f"### Objectives of the DDPM paper\n\nThe rows of table 2 of [Ho et al. 2020](papers.md), with `{PAPERS}` and "
        "otherwise the default parameters, also the cosine schedule. Compared with the last one. The FID is the "
        "paper's, on CIFAR-10, and cannot be compared with the other columns.\n"
    )
    columns = (TRAINED[0], LARGE, *QUALITY)
    yield table(["changed", "FID in the paper"], [*entries, held_out(runs, 1)], columns) + "\n"
    yield made_by(f"train --only objectives --steps {steps}", runs)
