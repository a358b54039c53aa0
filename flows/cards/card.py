"""Model cards: what a model is, what it was made from, how good it is, and what it is for.

They are README.md files in the format of Hugging Face's model cards (Mitchell et al. 2019, arXiv:1810.03993, propose
such cards), a function of the files of the stages. Whatever a card says of figures, data and training is in a file
whose digest leads to the model's weights; what does not is left out, and the card says so.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusion.errors import UserError, counted
from diffusion.pairs.pairs import MANIFEST, Manifest
from diffusion.progress import printable
from diffusion.storage.files import read_checked, sha256
from flows.cards import licenses
from flows.made_with import leaves
from flows.pages.contents import read_json, read_record, read_scores, table
from flows.paths import Paths
from flows.yaml_files import content, parse

TASK = {"type": "unconditional-image-generation", "name": "Unconditional image generation"}
OURS = ("library_name", "pipeline_tag", "datasets", "metrics", "model-index")
"""Fields of the front matter that are not the team's to write."""
LICENSE = r"[a-z0-9][a-z0-9.+-]*"
"""Spelling of Hugging Face's identifiers of licenses, unlike those of SPDX."""
COLOURS = {1: "greyscale", 3: "RGB", 4: "RGBA"}
JUDGED = {
    "good": "The samples are no worse than held-out images beyond the noise.",
    "still learning": "**The samples are worse than held-out images.**",
    "copying": "**Too many samples are near-copies of training images.**",
}
"""By the verdict in reports/evaluate.json."""
TEST, VAL, BOUND, SAMPLES, TEACHER = "pairs", "val_mse_images", "bits_per_dim_images", "quality_images", "teacher_"
"""Fields of reports/evaluate.json: on how many pairs, images or samples a figure was measured."""
FIGURES = (
    ("mse", "MSE of the predicted noise (predicting zero: 1)", TEST),
    ("r2", "R² of the predicted noise", TEST),
    ("val_mse", "MSE of the predicted noise, for model selection", VAL),
    ("bits_per_dim", "bound on the negative log-likelihood, bits/dim", BOUND),
    ("drift", "distance from the teacher's samples of the same noise, grey levels", ""),
    ("frechet_distance", "Fréchet distance from training images", SAMPLES),
    ("frechet_distance_4", "Fréchet distance from training images, in 4 steps", ""),
    ("frechet_distance_8", "Fréchet distance from training images, in 8 steps", ""),
    ("kid", "kernel distance (KID)", SAMPLES),
    ("precision", "precision", SAMPLES),
    ("recall", "recall", SAMPLES),
    ("coverage", "coverage", SAMPLES),
    ("near_copies", "share of near-copies of training images", SAMPLES),
)
MEASURED_ON = {TEST: "test pair", VAL: "validation image", BOUND: "test image", SAMPLES: "sample"}
SPLITS = {"mse": "test", "r2": "test", "bits_per_dim": "test", "val_mse": "validation"}
"""The images on which figures were measured. The others, except the drift, compare samples with training images."""
PINNED = {"test": "pairs_sha256", "validation": "val_pairs_sha256"}
"""Fields of scored.json with the digests of these pairs."""


class Form(NamedTuple):
    """In which form a model is delivered."""

    library: str
    """Hugging Face's name of the library that loads it."""
    files: Mapping[str, str]
    """SHA-256 of the files beside the card, by name."""
    usage: str
    """Python that loads it and generates images."""


class Figure(NamedTuple):
    """A row of the table of figures."""

    key: str
    label: str
    value: float
    low: float | None
    high: float | None
    """The 95 % interval; None if there is none."""
    measured_on: str

    @property
    def interval(self) -> str:
        """The interval as text."""
        return "" if self.low is None or self.high is None else f"{number(self.low)} to {number(self.high)}"


@dataclass(frozen=True)
class Known:
    """What files whose digests lead to the weights say of a model; empty where there are none."""

    weights: str
    """SHA-256 of model.safetensors."""
    config: dict[str, Any]
    """config.json beside it."""
    figures: dict[str, Any]
    """reports/evaluate.json."""
    scored: dict[str, str]
    """Digests of what was scored."""
    parameters: dict[str, Any]
    """Of the training, by dotted name."""
    training: dict[str, Any]
    """reports/train.json."""
    teacher: str
    """SHA-256 of the weights of a student's teacher."""
    start: str
    """SHA-256 of the weights that the training started from; empty for random ones."""
    pairs: Manifest | None
    shards: dict[str, Any]
    """The manifest of the images that it was trained on."""
    digests: dict[str, str]
    """Of the data, by file."""


def render(paths: Paths, model: Path, form: Form) -> str:
    """The card of the model in the folder `model`, whose results are in `paths`.

    Raises:
        UserError: a file of the results is damaged, or model-card.md or data/licenses.yaml is not valid.
    """
    known = _read(paths, model)
    fields, text = team_text(paths.card_text)
    source = str(known.shards.get("source", ""))
    name = Path(_public(source).rstrip("/")).stem
    rows, kind = list(_figures(known.figures)), "ddpm-student" if paths.student else "ddpm"
    own = ["diffusion", "ddpm", *(["distillation"] if known.teacher else [])]
    teacher = {"weights": known.teacher, "figures": list(_figures(known.figures, TEACHER))}
    front = {
        "license": "unknown",
        "library_name": form.library,
        "pipeline_tag": TASK["type"],
        **fields,
        "tags": list(dict.fromkeys([*own, *fields["tags"]])),
        "datasets": [name] if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) else [],  # others the Hub refuses
        "metrics": [row.key for row in rows],
        "model-index": _index(f"{kind}-{name}" if name else kind, name, known, rows),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # no HTML; names from the data go through `inert`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "inert": inert}
    of = f" of {name}" if name else ""
    return environment.get_template("card.md.jinja").render(
        front_matter=content({key: value for key, value in front.items() if value}).decode(),
        title=f"{'Distilled diffusion' if known.teacher else 'Diffusion'} model{of}",
        summary=_summary(known, name),
        text=text,
        figures=rows,
        features=_features(paths, known),
        judgement=JUDGED.get(str(known.figures.get("quality")), ""),
        teacher=teacher if known.teacher else None,
        data=_data(known, licenses.read(paths.licenses).get(source)) if known.shards else None,
        known=known,
        parameters=_parameters(known),
        files=form.files,
        usage=form.usage.strip(),
    )


def team_text(path: Path) -> tuple[dict[str, Any], str]:
    """Fields for the front matter, `tags` among them, and the text, both of which the team writes in model-card.md.

    Raises UserError if they are not valid. Without the file, the card has neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    match = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n(.*))?\Z", text, re.DOTALL | re.MULTILINE)
    if match is None and text.startswith("---"):
        raise UserError(f"{path}: the fields at its top do not end; add a line ---")
    fields = dict(parse(match[1], path)) if match and match[1].strip() else {}
    tags = fields.setdefault("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(f"{path}: tags: must be a list of names such as [art]")
    if not all(re.fullmatch(LICENSE, str(each)) for each in _listed(fields.get("license", "unknown"))):
        raise UserError(f"{path}: license: must be an identifier of the Hub, in lower case, such as apache-2.0")
    if written := [name for name in OURS if name in fields]:
        raise UserError(f"{path}: {', '.join(written)}: written by the pipeline; delete it")
    return fields, (match[2] or "" if match else text).strip()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read(paths: Paths, model: Path) -> Known:
    weights, record = sha256(model / "model.safetensors"), read_record(paths, "train")
    found, ours = read_scores(paths, weights), paths.model.relative_to(paths.root).as_posix()
    trained = record["wrote"].get(f"{ours}/model.safetensors") == weights
    teacher = found["scored"].get("teacher_sha256", "")
    parameters, training, shards, digests = dict[str, Any](), dict[str, Any](), dict[str, Any](), dict[str, str]()
    pairs, start = None, ""
    if trained:
        of_teacher = (paths.teacher / "model.safetensors").relative_to(paths.root).as_posix()
        teacher = record["read"].get(of_teacher, teacher)
        parameters = record["params"]
        if name := parameters.get("train.start_from"):
            start = record["read"].get(f"data/models/{name}/model.safetensors", "")
        report = paths.train_report.relative_to(paths.root).as_posix()
        training = read_json(paths.train_report, record["wrote"].get(report))
        manifest = paths.pairs / MANIFEST
        if manifest.exists() and sha256(manifest) == record["read"].get(manifest.relative_to(paths.root).as_posix()):
            pairs = Manifest.read(manifest)
            digests[f"data/pairs/{MANIFEST}"] = sha256(manifest)
            if (images := paths.shards / MANIFEST).exists() and sha256(images) == pairs.shards_sha256:
                shards = read_json(images)
                digests[f"data/shards/{MANIFEST}"] = pairs.shards_sha256
    return Known(
        weights=weights,
        config=json.loads(read_checked(model / "config.json")),
        figures=found["figures"],
        scored=found["scored"],
        parameters=parameters,
        training=training,
        teacher=teacher,
        start=start,
        pairs=pairs,
        shards=shards,
        digests=digests,
    )


def _parameters(known: Known) -> dict[str, str]:
    """Those of network, process and training, by dotted name, as in params.yaml."""
    chosen: dict[str, Any] = {name: known.config[name] for name in ("network", "process") if name in known.config}
    found = dict(leaves(chosen)) | known.parameters
    return {
        name: value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        for name, value in found.items()
        if name != "device"
    }


def _figures(report: Mapping[str, Any], prefix: str = "") -> Iterator[Figure]:
    """The rows of the figures in a report whose names have a prefix."""
    for key, label, images in FIGURES:
        if (value := report.get(f"{prefix}{key}")) is not None:
            low, high = (report.get(f"{prefix}{key}_{end}") for end in ("low", "high"))
            on = counted(report[images], MEASURED_ON[images], spec=",") if images in report and not prefix else ""
            yield Figure(key, label, value, low, high, on)


def _features(paths: Paths, known: Known) -> str:
    """A sentence about what the figures of the samples compare; empty if they were not measured."""
    file = paths.evaluation / "quality.csv"
    if "frechet_distance" not in known.figures or not file.exists():
        return ""
    features = {str(row["features"]) for row in table(file) if row["metric"] == "frechet_distance"}
    steps = f" in {counted(known.figures['sampling_steps'], 'step')}" if "sampling_steps" in known.figures else ""
    return f" The samples were drawn{steps}, and compared in {inert(', '.join(features))}."


def _index(name: str, data: str, known: Known, rows: list[Figure]) -> list[dict[str, Any]]:
    """The figures as the field `model-index`, by split, with the pairs that were scored as the data set's revision."""
    of_split: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        interval = {} if row.low is None or row.high is None else {"low": row.low, "high": row.high, "level": 0.95}
        metric = {"type": row.key, "name": row.label, "value": row.value} | ({"args": interval} if interval else {})
        of_split.setdefault(SPLITS.get(row.key, "train" if row.key != "drift" else ""), []).append(metric)
    results = []
    for split, metrics in of_split.items():
        images = {"split": split, "revision": known.scored.get(PINNED.get(split, ""))}
        of = {"type": data or "unknown", "name": data or "unknown"} | {
            key: each for key, each in images.items() if each
        }
        results.append({"task": TASK, "dataset": of, "metrics": metrics})
    return [{"name": name, "results": results}] if results else []


def _summary(known: Known, name: str) -> str:
    channels, height, width = known.config["shape"]
    images = f"{COLOURS.get(channels, f'{channels}-channel')} images of {width}x{height} pixels"
    network = known.config.get("network", {})
    size = counted(known.training["parameters"], "parameter", spec=",") if "parameters" in known.training else ""
    steps = counted(known.training["steps"], "step", spec=",") if "steps" in known.training else ""
    verb = "distilled" if known.teacher else "trained"
    parts = [
        f"Network `{network.get('kind', 'unet')}`",
        f" with {size}" if size else "",
        f", {verb} for {steps}" if steps else "",
        f" on {inert(name)}" if name else "",
        f". It generates {images}, and no others",
        ", by class." if network.get("classes") else ".",
    ]
    return "".join(parts)


def _data(known: Known, license: licenses.License | None) -> dict[str, Any]:
    """What the images were, and under which license."""
    shards, pairs = known.shards, known.pairs
    assert pairs is not None
    splits = ", ".join(f"{contents.images:,} {split}" for split, contents in pairs.splits.items())
    similar = sum(each["images"] for each in shards.get("near_duplicates") or ())
    rejected = len(shards["rejected"]) + sum(shards.get("more_rejected", {}).values())
    remarks = {"rejected file": rejected, "exact copy": shards["copies"], "near-duplicate": similar}
    named = {"exact copy": "exact copies", "near-duplicate": "near-duplicates in different splits"}
    said = [counted(count, noun, named.get(noun, ""), ",") for noun, count in remarks.items() if count]
    return {
        "source": _public(shards["source"]),
        "license": license.license if license else "not stated; `ddpm import --license` records it",
        "url": license.url if license else "",
        "images": splits,
        "size": f"{pairs.width}x{pairs.height}, from {_sides(shards)}",
        "classes": ", ".join(pairs.classes) or "none",
        "digests": known.digests
        | {
            f"the {split} pairs that were scored": known.scored[key]
            for split, key in (("test", "pairs_sha256"), ("validation", "val_pairs_sha256"))
            if key in known.scored
        },
        "remarks": f"Found in the data: {', '.join(said)}." if said else "",
    }


def _public(source: str) -> str:
    """The source without the query of a URL, which may be a signature."""
    return source.partition("?")[0] if "://" in source else source


def _sides(shards: Mapping[str, Any]) -> str:
    smallest, largest = ("x".join(map(str, shards[end])) for end in ("smallest", "largest"))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def number(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def inert(text: str) -> str:
    """Text from the data as Markdown that shows it literally, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#&!])", r"\\\1", printable(text))
