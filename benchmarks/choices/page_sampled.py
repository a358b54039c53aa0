"""The part of the page about samples of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from choices import charts
from choices.results import Row
from choices.sampling import SPACING_STEPS
from choices.tables import QUALITY, Column, Entry, by_seed, compared, grouped, held_out, made_by, table
from diffusion.process.denoiser import THRESHOLDS
from diffusion.process.variance import VARIANCES
from diffusion.sampling.sampler import SAMPLERS
from diffusion.sampling.spacing import SPACINGS

Options = dict[str, Any]
AGREEMENT = Column("class_agreement", "class agreement", 3, 1)
ORDER = [*SAMPLERS, *SPACINGS, *THRESHOLDS, *VARIANCES]
IN_CHART = (QUALITY[0], QUALITY[-1])


class Group(NamedTuple):
    """A table of samples."""

    heading: str
    text: str
    shown: tuple[str, ...]
    """Options that its rows may change, and that stand in their names."""
    varied: tuple[str, ...]
    """Options that differ between a row and the one it is compared with."""
    belongs: Callable[[Options], bool] = lambda _: True
    """Whether a row with these options belongs to it."""


TABLES = {
    "sampler": Group(
        "Sampler and steps",
        "`heun` evaluates the network twice in most steps. Compared with the options above.",
        ("sampler", "steps"),
        ("sampler", "steps"),
    ),
    "spacing": Group(
        "Spacing",
        "Few steps, where the spacing matters most. Compared with the spacing above, in as many steps.",
        ("spacing", "steps"),
        ("spacing",),
        lambda options: options["steps"] in SPACING_STEPS,
    ),
    "threshold": Group("Threshold", "Compared with the options above.", ("threshold",), ("threshold",)),
    "guidance": Group(
        "Guidance",
        "Compared with the options above. Class agreement is the share of samples that a classifier assigns to the "
        "class they were generated for; higher is better.",
        ("guidance",),
        ("guidance",),
    ),
    "variance": Group(
        "Variance",
        "Only the sampler `ddpm` uses it. Compared with the variance above.",
        ("sampler", "variance"),
        ("variance",),
        lambda options: options["sampler"] == "ddpm",
    ),
}


def sampled(rows: Sequence[Row], data: str, drawn: dict[str, bytes], pictures: Mapping[str, str]) -> Iterator[str]:
    """The text about samples; adds charts to `drawn`. `pictures`: links to rows of samples by SAMPLER-STEPS."""
    for number, (common, runs) in enumerate(grouped(rows, "set").items()):
        base: Options = runs[0]["base"]
        options = ", ".join(f"`{name}: {value}`" for name, value in base.items())
        yield f"## What needs no training: {data}{f', with `{common}`' if common else ''}\n"
        yield f"Samples of a single model, with {options}, and one change at a time.\n"
        for name, group in TABLES.items():
            entries = _entries(group, runs, base)
            if not any(entry.baseline for entry in entries):
                continue
            yield f"### {group.heading}: {data}\n\n{group.text}\n"
            if name == "sampler":
                chart = f"samplers-{data}{f'-{number}' if number else ''}.svg"
                drawn[chart] = _chart(entries, base)
                yield f"![{IN_CHART[0].label} and {IN_CHART[1].label} by network evaluations]({chart})\n"
            columns = [*QUALITY, *([AGREEMENT] if name == "guidance" else [])]
            shown = [*entries, held_out(runs, 2)]
            yield table(["changed", "network evaluations", "CPU ms"], shown, columns) + "\n"
            made = [run for entry in entries for run in entry.runs]
            given = f" --set {common}" if common else ""
            yield made_by(f"sample --tree TREE --data {data} --only {name}{given}", made)
            if name == "sampler" and not number and pictures:
                yield from _pictures(pictures, data)


def _entries(group: Group, runs: Sequence[Row], base: Options) -> list[Entry]:
    """The rows of a table, in the order of the choices."""
    changes = {
        tuple(sorted(run["change"].items())): (base | run["change"], run["change"])
        for run in runs
        if run["change"].keys() <= set(group.shown) and group.belongs(base | run["change"])
    }
    entries = []
    for full, change in sorted(changes.values(), key=lambda pair: [_rank(pair[0][name]) for name in group.shown]):
        reference = {name: value for name, value in change.items() if name not in group.varied}
        same = [run for run in runs if run["change"] == change]
        against = [run for run in runs if run["change"] == reference] if reference != change else []
        label = ", ".join(f"`{full[name]}`" if name != "steps" else f"{full[name]} steps" for name in group.shown)
        entries.append(Entry(label, same, against, (f"{_mean(same, 'evaluations'):g}", f"{_milliseconds(same):.3g}")))
    return entries


def _rank(value: Any) -> float:
    return ORDER.index(value) if value in ORDER else value


def _mean(runs: Sequence[Row], name: str) -> float:
    return float(sum(run[name] for run in runs) / len(runs))


def _milliseconds(runs: Sequence[Row]) -> float:
    """CPU time for each sample."""
    return 1000 * sum(run["cpu_seconds"] for run in runs) / sum(run["samples"] for run in runs)


def _chart(entries: Sequence[Entry], base: Options) -> bytes:
    """Figures by network evaluations, a line for each sampler."""
    panels: dict[str, dict[str, list[charts.Point]]] = {column.label: {} for column in IN_CHART}
    for entry in entries:
        sampler = (base | entry.runs[0]["change"])["sampler"]
        for column in IN_CHART:
            cell = compared(entry, column)
            point = charts.Point(_mean(entry.runs, "evaluations"), cell.mean, cell.sd)
            panels[column.label].setdefault(sampler, []).append(point)
    real = held_out(entries[0].runs, 0).runs
    references = {column.label: next(iter(by_seed(real, column.name).values())) for column in IN_CHART}
    return charts.lines(panels, references, "network evaluations per sample")


def _pictures(pictures: Mapping[str, str], data: str) -> Iterator[str]:
    found = {tuple(stem.rsplit("-", 1)): link for stem, link in pictures.items()}
    ordered = sorted(found.items(), key=lambda item: (_rank(item[0][0]), int(item[0][1])))
    lines = [
        f"| `{sampler}`, {steps} steps | ![{data}: {sampler}, {steps} steps]({link}) |"
        for (sampler, steps), link in ordered
    ]
    yield "The same noise in each column:\n\n" + "\n".join(["| | samples |", "|---|---|", *lines]) + "\n"
