"""The report of one set of results."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from diffusion.errors import UserError
from diffusion.evaluation import quality
from diffusion.storage.files import sha256, write_csv, write_json, write_sums
from flows import made_with
from flows import params as parameters
from flows.gate import Row
from flows.pages import contents, report
from flows.pages.rendering import bars, number, parameter, signed
from flows.params import Params
from flows.paths import Paths

pytestmark = pytest.mark.slow
SAMPLING = {
    "sample.sampler": "ddpm",
    "sample.variance": "analytic",
    "sample.steps": 20,
    "sample.spacing": "log-snr",
    "sample.threshold": "dynamic",
    "seed": 7,
}


class Loaded(HTMLParser):
    """What a page would load, its texts, and whether its elements are nested properly."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, _: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_alone(page: str) -> str:
    """The page's text; it must load nothing."""
    loaded = Loaded(page)
    assert all(address.startswith(("data:", "#")) for address in loaded.addresses)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert "<script" not in page
    return " ".join(" ".join(loaded.texts).split())


def rendered(tree: Path, **more: Any) -> str:
    params = parameters.load(tree / "params.yaml")
    flat = made_with.flat(params, "seed", "sample", "evaluate")
    return report.page(contents.read(Paths(tree)), flat, made_with.flat(Params()), **more)


def write_figures(tree: Path, figures: dict[str, Any]) -> None:
    """Write another reports/evaluate.json, as evaluate would."""
    path, scored = tree / "reports/evaluate.json", tree / "reports/evaluation/scored.json"
    write_json(path, figures)
    write_json(scored, json.loads(scored.read_text()) | {"report_sha256": sha256(path)})
    write_sums(tree / "reports/evaluation")


@pytest.fixture
def tree(whole_tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_tree, tmp_path / "tree"))


def test_the_stage_writes_the_page(whole_tree: Path) -> None:
    page = (whole_tree / "reports/report.html").read_text()
    text = check_alone(page)
    assert page == rendered(whole_tree)  # so it can be made again from the files
    figures = json.loads((whole_tree / "reports/evaluate.json").read_text())
    for name in ("mse", "mse_low", "r2", "val_mse", "wiener_mse", "bits_per_dim", "bits_per_dim_pixel_histogram"):
        assert f"{figures[name]:.4f}" in text
    assert "Network unet with 13,500 parameters, trained for 40 steps on digits: 1,452 greyscale images of 8x8" in text
    for caption in ("Real pictures", "The forward process", "The reverse process", "Held-out error while training"):
        assert caption in text
    assert page.count('src="data:image/png;base64,') == 5  # samples, real ones, nearest ones, filmstrips
    assert len(re.findall(r"<svg viewBox=\"0 0 [\d.]+ [\d.]+\"", page)) - page.count('"0 0 26 10"') == 4  # the curves
    assert "Every file was used." in text


def test_parameters_that_differ_from_the_defaults_come_first(whole_tree: Path) -> None:
    page = rendered(whole_tree)
    defaults = made_with.flat(Params())
    names = re.findall(r"<tr><td>(?:<b>)?([a-z_]+\.[a-z_.]+|seed)(?:</b>)?</td>", page)
    bold = re.findall(r"<tr><td><b>([a-z_.]+)</b></td>", page)
    assert names[: len(bold)] == bold == sorted(bold)
    known = dict(made_with.flat(parameters.load(whole_tree / "params.yaml"), "sample", "evaluate", "train", "network"))
    assert {name for name in known if known[name] != defaults.get(name)} <= set(bold)
    assert not {name for name in known if name in defaults and known[name] == defaults[name]} & set(bold)


def test_the_baselines_decide_the_verdicts() -> None:
    figures = {"mse": 0.2, "mse_low": 0.19, "mse_high": 0.21, "wiener_mse": 0.3}
    bound = {f"bits_per_dim_{name}": value for name, value in (("uniform", 4.0), ("histogram", 3.0))}
    bound |= {"bits_per_dim": 3.5, "bits_per_dim_pixel_histogram": 2.5}
    worse = bound | {"bits_per_dim_gain_low": -1.1, "bits_per_dim_gain_high": -0.9}
    assert [each[:3] for each in report.verdicts(figures | worse | {"quality": "copying"})] == [
        ("Noise prediction", "good", "better than the linear baseline"),
        ("Likelihood", "bad", "worse than the histogram of each pixel"),
        ("Samples", "bad", "copying"),
    ]
    assert report.verdicts(figures | worse)[1].more == "3.5000 bits/dim against 2.5000"
    (only,) = report.verdicts(figures | {"wiener_mse": 0.205})  # an older evaluation lacks the others
    assert only == (
        "Noise prediction",
        "neutral",
        "no different, within its noise, from the linear baseline",
        "MSE 0.2000 against 0.2050",
    )
    assert report.verdicts(figures | {"wiener_mse": 0.1})[0].mood == "bad"


def test_how_ancestral_samples_were_made() -> None:
    assert report.describe(SAMPLING, conditional=False) == (
        "Sampler ddpm, variance analytic, 20 steps, spacing log-snr, threshold dynamic, EMA weights, seed 7; uncurated."
    )


@pytest.mark.parametrize(
    ("changes", "conditional", "words"),
    [
        ({"sample.sampler": "ddim", "sample.sampler.eta": 0.5}, False, "Sampler ddim, eta 0.5, 20 steps"),
        ({"sample.sampler": "dpm-solver++-sde"}, False, "Sampler dpm-solver++-sde, 20 steps"),
        ({"sample.guidance": 1.5}, True, ", classes in turn with guidance 1.5, "),
    ],
)
def test_how_samples_were_made(changes: dict[str, Any], conditional: bool, words: str) -> None:
    text = report.describe(SAMPLING | {"sample.guidance": 1.0} | changes, conditional)
    assert words in text
    assert ("guidance" in text) == conditional


def test_what_is_missing_is_left_out(tree: Path) -> None:
    """As in a run of an earlier version, or with an imported model."""
    for part in ("data/shards", "reports/train_curves"):
        shutil.rmtree(tree / part)
    for name in ("heldout.png", "noising.png", "bands.csv"):
        (tree / "reports/evaluation" / name).unlink()
    (tree / "reports/train.json").unlink()
    figures = json.loads((tree / "reports/evaluate.json").read_text())
    write_figures(tree, {name: figures[name] for name in figures if not name.startswith("bits_per_dim_gain")})
    text = check_alone(rendered(tree))
    for caption in (
        "Real pictures",
        "The forward process",
        "Held-out error while training",
        "Likelihood:",
        "trained for",
    ):
        assert caption not in text
    assert "Noise prediction" in text
    assert "train.steps" not in text  # an imported model


def test_the_quality_of_samples(tree: Path) -> None:
    names = ("metric", "features", "set", "value", "low", "high", "n")
    rows: list[Any] = [
        dict(zip(names, row, strict=True))
        for row in (
            ("frechet_distance", "own <features>", "samples", 21.5, 20.0, 23.0, 100),
            ("frechet_distance", "own <features>", "held-out", 3.5, 3.0, 4.0, 100),
            ("near_copies", "pixels", "samples", 0.0, 0.0, 0.0, 100),
        )
    ]
    write_csv(tree / "reports/evaluation/quality.csv", rows)
    settings = [("heun", 10, 18), ("ddim <eta>", 5, 5)]
    compared: list[Any] = [
        {"sampler": name, "spacing": "log-snr", "steps": steps, "evaluations": evaluations}
        | {metric + end: 4.25 + len(end) for metric in quality.COMPARED for end in ("", "_low", "_high")}
        | {"n": 1100, "features": "own <features>"}
        for name, steps, evaluations in settings
    ]
    write_csv(tree / "reports/evaluation/samplers.csv", compared)
    shutil.copy(tree / "reports/evaluation/samples.png", tree / "reports/evaluation/nearest.png")
    write_sums(tree / "reports/evaluation")
    page = rendered(tree)
    text = check_alone(page)
    assert "Fréchet distance own <features> 21.5" in text
    assert "own &lt;features&gt;" in page
    for figure in ("21.5", "20 to 23", "3.5000", "near-copies of training images", "nearest training image"):
        assert figure in text
    assert "1,100 samples in each setting" in text
    assert "heun 10 18 4.2500 8.2500 to 9.2500" in text
    assert "ddim &lt;eta&gt;" in page
    assert page.count(">sampling steps</text>") == 2


def test_intervals_are_drawn_to_scale_in_the_colour_of_their_set() -> None:
    drawn = bars([(1.0, 0.0, 2.0), (3.0, 2.0, 4.0)])
    assert re.findall(r'class="series-(\d)"><path d="M([\d.]+) \d+H([\d.]+)"/><circle cx="([\d.]+)"', drawn) == [
        ("0", "4.0", "60.0", "32.0"),
        ("1", "60.0", "116.0", "88.0"),
    ]
    assert 'class="series-0"' not in bars([None, (1.0, 1.0, 1.0)])
    assert 'class="series-1"><path d="M60.0 14H60.0"' in bars([None, (1.0, 1.0, 1.0)])


def test_names_are_escaped(tree: Path) -> None:
    manifest = json.loads((tree / "data/shards/manifest.json").read_text())
    manifest["source"] = "data/raw/<b>&.npz"
    manifest["classes"][0] = '<img src="http://there">'
    manifest["rejected"] = [{"file": "x", "reason": "<script>"}] * 2
    write_json(tree / "data/shards/manifest.json", manifest)
    write_sums(tree / "data/shards")
    row = Row("<b>&.", "<script>", 0.0, verdict="<i>")._asdict()
    about = report.About("<i>", "<u>", {"shard.source": "<s>"}, [], [row], "<q>", [], ["<pre>"], {"<tt>": "<em>"})
    page = rendered(tree, about=about)
    for text in ("<b>&.", '<img src="http', "<script>", "<i>", "<u>", "<s>", "<pre><pre>", "<q>", "<tt>", "<em>"):
        assert text not in page
    assert "2 files were rejected." in page


@pytest.mark.parametrize(
    "name",
    [
        "reports/evaluation/samples.png",
        "reports/evaluation/mse_by_t.csv",
        "reports/evaluate.json",
        "reports/train.json",
        "data/shards/manifest.json",
    ],
)
def test_damaged_files_are_refused(tree: Path, name: str) -> None:
    with (tree / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=f"{name}: damaged"):
        contents.read(Paths(tree))


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "evaluate.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluate\.json: damaged \(it is not"):
        contents.read_json(path)


def test_numbers() -> None:
    assert [number(value) for value in (1452, 0.12345, 0.0, 21.456, 1.25e-9, "word", 1)] == [
        "1,452", "0.1235", "0.0000", "21.46", "1.25e-09", "word", "1",
    ]  # fmt: skip
    assert [signed(value) for value in (0.5, -0.5, 0.0)] == ["+0.5000", "−0.5000", "+0.0000"]
    assert [parameter(value) for value in (1.0, 100000, [1, 2], ("a",), True, "", "auto", "–")] == [
        "1.0", "100000", "[1, 2]", '["a"]', "true", '""', "auto", "–",
    ]  # fmt: skip
