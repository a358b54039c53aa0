"""The report of one set of results: what was trained on what, how good it is, and how to make it again."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.errors import counted
from diffusion.evaluation import charts, noise_prediction, quality, samplers
from flows import baselines
from flows.pages.contents import Contents, Row
from flows.pages.rendering import bars, parameter, render

ERRORS = {
    "mse": "MSE",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "wiener_mse": "MSE of the linear Wiener denoiser",
    "zero_mse": "MSE of predicting zero",
    "val_mse": "MSE on the validation pairs, used for model selection",
}
BOUNDS = {
    "bits_per_dim": "Bound, estimated",
    "bits_per_dim_exact": "Bound, exact",
    "bits_per_dim_prior": "of which L_T (prior)",
    "bits_per_dim_diffusion": "of which the sum of L_t−1 (denoising steps)",
    "bits_per_dim_decoder": "of which L_0 (decoder, to discrete pixel values)",
    **{f"bits_per_dim_{name}": f"{label[0].upper()}{label[1:]}" for name, label in baselines.LABELS.items()},
}
SAMPLES = {
    "good": ("good", "good", "no figure is worse than that of held-out images by more than the noise"),
    "still learning": ("neutral", "still learning", "figures in the table are worse than those of held-out images"),
    "copying": ("bad", "copying", "too many are near-copies of training images"),
}
"""By the verdict in reports/evaluate.json: mood, verdict, and what it means."""
COLOURS = {1: "greyscale", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class About:
    """What is known of a run besides the results of its stages."""

    name: str
    when: str
    """A sentence that says when it ran."""
    parameters: dict[str, Any]
    """All of params.yaml, by dotted name."""
    stages: list[Any]
    """`StageSummary` of each stage."""
    gate: list[Row]
    """The decision whether the model becomes champion, by rule."""
    decision: str
    """The same in a sentence."""
    export: list[list[str]]
    """Rows of the ONNX files: name, MB, MSE, change."""
    commands: list[str]
    digests: dict[str, str]


class Verdict(NamedTuple):
    """What a figure means."""

    subject: str
    mood: str
    """good, bad or neutral."""
    words: str
    more: str


def page(contents: Contents, parameters: dict[str, Any], defaults: dict[str, Any], about: About | None = None) -> str:
    """Render the report.

    Without `about`, it is a function of what evaluate reads and writes, so that DVC can keep it.

    Args:
        contents: the results.
        parameters: seed, sample and evaluate, by dotted name.
        defaults: of all parameters, by dotted name.
        about: of the run.
    """
    figures, tables = contents.figures, contents.tables
    source = data_name(contents, parameters if about is None else about.parameters)
    known = (about.parameters if about else parameters | contents.trained_with) | contents.model
    rows = [(name, parameter(value), parameter(defaults.get(name, "–"))) for name, value in sorted(known.items())]
    same = [name in defaults and _plain(value) == _plain(defaults[name]) for name, value in sorted(known.items())]
    reasons = Counter(remark["reason"] for remark in contents.shards.get("rejected", []))
    reasons += Counter(contents.shards.get("more_rejected", {}))
    return render(
        "report.html",
        title=" – ".join(filter(None, ["Report", source, about.name if about else ""])),
        summary=_summary(contents, source),
        about=about,
        verdicts=verdicts(figures),
        pictures=contents.pictures,
        how=describe(parameters, contents.conditional),
        figures=figures,
        quality=_quality(tables.get("quality", [])),
        draws=quality.DRAWS,
        samplers=_samplers(tables.get("samplers", [])),
        resized=_resized(contents),
        data=contents.shards,
        reasons=reasons.most_common(),
        rejected=reasons.total(),
        curves=_curves(tables),
        errors=ERRORS,
        mse_by_t=charts.mse_by_t({"model": tables["mse_by_t"]}),
        bands=tables.get("bands"),
        bounds=BOUNDS,
        variance=parameters.get("sample.variance", "–"),
        vlb_by_t=charts.vlb_by_t({"model": tables["vlb_by_t"]}),
        changed=[row for row, equal in zip(rows, same, strict=True) if not equal],
        unchanged=[row for row, equal in zip(rows, same, strict=True) if equal],
        commands=about.commands if about else ["dvc repro"],
        seeds=f"Every random number is a function of the seed, {parameters.get('seed', '–')}, and its purpose.",
        digests=sorted((about.digests if about else _scored(figures)).items()),
    )


def verdicts(figures: dict[str, Any]) -> list[Verdict]:
    """What the figures mean, in words; without those that older evaluations lack."""
    found = [_against("Noise prediction", noise_prediction.verdict(figures), "")]
    if "bits_per_dim_gain_low" in figures:
        found.append(_against("Likelihood", baselines.verdict(figures), f"{figures['bits_per_dim']:.4f} bits/dim"))
    if "quality" in figures:
        found.append(Verdict("Samples", *SAMPLES.get(figures["quality"], ("neutral", str(figures["quality"]), ""))))
    return found


def _against(subject: str, text: str, value: str) -> Verdict:
    """A verdict on a baseline, in words with the baseline's figure in parentheses."""
    words, _, figure = text.partition(" (")
    mood = {"better": "good", "worse": "bad"}.get(words.partition(" ")[0], "neutral")
    return Verdict(subject, mood, words, f"{value} against {figure[:-1]}" if value else figure[:-1])


def describe(parameters: dict[str, Any], conditional: bool) -> str:
    """Describe in one sentence how the samples were generated, from the parameters by dotted name."""
    given = {name.removeprefix("sample."): value for name, value in parameters.items() if name.startswith("sample.")}
    fields = {name.partition(".")[2]: value for name, value in given.items() if name.startswith("sampler.")}
    if given.get("sampler") == "ddpm":
        fields["variance"] = given["variance"]
    parts = [
        f"Sampler {given['sampler']}",
        *(f"{name} {value}" for name, value in fields.items()),
        f"{counted(given['steps'], 'step')}, spacing {given['spacing']}",
        f"threshold {given['threshold']}",
        *([f"classes in turn with guidance {given['guidance']:g}"] if conditional else []),
        "EMA weights",
        f"seed {parameters.get('seed')}",
    ]
    return f"{', '.join(parts)}; uncurated."


def data_name(contents: Contents, parameters: dict[str, Any]) -> str:
    """A short name of the data set; empty if unknown."""
    source = contents.shards.get("source") or parameters.get("shard.source", "")
    return Path(source).stem


def _summary(contents: Contents, source: str) -> str:
    pairs, training = contents.pairs, contents.training
    colours = COLOURS.get(pairs.channels, f"{pairs.channels}-channel")
    network = f"Network {contents.model.get('network.kind', '')}"
    if "parameters" in training:
        network += f" with {counted(training['parameters'], 'parameter', spec=',')}"
    steps = f", trained for {counted(training['steps'], 'step', spec=',')}" if "steps" in training else ""
    data = f" on {source}" if source else ""
    classes = f"; {counted(len(pairs.classes), 'class', 'classes')}" if pairs.classes else ""
    used = "" if not pairs.classes or contents.conditional else ", which the network does not use"
    return (
        f"{network}{steps}{data}: {counted(pairs.splits['train'].images, f'{colours} image', spec=',')} of "
        f"{pairs.width}x{pairs.height} pixels{classes}{used}."
    )


def _resized(contents: Contents) -> str:
    pairs = contents.pairs
    done = pairs.fit.describe(pairs.cropped, pairs.cropped_area, pairs.enlarged)
    return f"All images have {pairs.width}x{pairs.height} pixels; {done or 'none was cropped or enlarged'}."


def _curves(tables: dict[str, list[Row]]) -> list[tuple[charts.Chart, str]]:
    drawn = []
    if tables.get("heldout"):
        chart = charts.heldout({"EMA weights": tables["heldout"]})
        drawn.append((chart, "Held-out error while training, on up to 1,024 validation pairs."))
    if tables.get("loss"):
        drawn.append((charts.loss({"training loss": tables["loss"]}), "Training loss, with the weighting of the loss."))
    return drawn


def _quality(rows: list[Row]) -> dict[str, Any]:
    """The table of quality.csv: for each metric, a cell for each set, and the intervals of samples and held-out images.

    Empty if there are no rows.
    """
    sets = list(dict.fromkeys(row["set"] for row in rows))
    metrics = dict.fromkeys((row["metric"], row["features"]) for row in rows)
    found = []
    for metric, features in metrics:
        cells = {row["set"]: row for row in rows if (row["metric"], row["features"]) == (metric, features)}
        label = quality.LABELS.get(metric, metric.replace("_", " "))
        shown = [cells.get(name) for name in ("samples", "held-out")]
        intervals = [(cell["value"], cell["low"], cell["high"]) if cell else None for cell in shown]
        drawn = bars(intervals) if any(shown) else ""
        found.append((label, features if features != quality.PIXELS else "", [cells.get(name) for name in sets], drawn))
    return {"sets": sets, "rows": found} if found else {}


def _samplers(rows: list[Row]) -> dict[str, Any]:
    """The table of samplers.csv, by setting, and its charts over the number of steps; empty if there are no rows."""
    if not rows:
        return {}
    labels = {metric: quality.LABELS[metric] for metric in quality.COMPARED}
    drawn = [
        (samplers.chart(rows, metric), f"{labels[metric]} by steps.") for metric in ("frechet_distance", "coverage")
    ]
    named = list(zip(samplers.settings(rows), rows, strict=True))
    return {"rows": named, "labels": labels, "charts": drawn, "n": int(rows[0]["n"]), "features": rows[0]["features"]}


def _scored(figures: dict[str, Any]) -> dict[str, str]:
    return {name: figures[name] for name in ("weights_sha256", "pairs_sha256", "val_pairs_sha256") if name in figures}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
