"""Model cards, read with huggingface_hub: figures, data and licenses of exactly these weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from diffusion.errors import UserError
from diffusion.storage.files import sha256, write_json, write_sums
from flows import params
from flows.cards import card, licenses
from flows.cards.licenses import License
from flows.paths import Paths
from flows.stages import export

ROOT = Path(__file__).parents[3]
FORM = card.Form("onnx", {"sampler.onnx": "5" * 64}, "import onnxruntime")


@pytest.fixture
def paths(whole_tree: Path, tmp_path: Path) -> Paths:
    """All results, with the license of the digits and the repository's text."""
    for part in ("models", "reports"):
        shutil.copytree(whole_tree / part, tmp_path / part)
    for part in ("data/pairs/manifest.json", "data/pairs/SHA256SUMS", "data/shards/manifest.json"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole_tree / part, tmp_path / part)
    shutil.copy(ROOT / "model-card.md", tmp_path)
    shutil.copy(ROOT / "data/licenses.yaml", tmp_path / "data")
    return Paths(tmp_path)


def render(paths: Paths) -> ModelCard:
    return ModelCard(card.render(paths, paths.model, FORM))


def cells(text: str) -> dict[str, list[str]]:
    """The rows of all tables, by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in rows}


def test_figures_are_those_of_the_evaluation_with_their_intervals(paths: Paths) -> None:
    found, report = render(paths), json.loads(paths.evaluate_report.read_text())
    results = {result.metric_type: result for result in found.data.eval_results}
    names = {"mse", "r2", "val_mse", "bits_per_dim", "frechet_distance", "kid", "precision", "recall", "coverage"}
    assert set(results) == names | {"near_copies"} == set(found.data.metrics)
    for name, result in results.items():
        assert result.metric_value == report[name]
        interval = {"low": report[f"{name}_low"], "high": report[f"{name}_high"], "level": 0.95}
        assert result.metric_args == interval
        assert result.dataset_name == "digits"
    scored = json.loads((paths.evaluation / "scored.json").read_text())
    tested, validated = ("test", scored["pairs_sha256"]), ("validation", scored["val_pairs_sha256"])
    expected = dict.fromkeys(results, ("train", None)) | dict.fromkeys(("mse", "r2", "bits_per_dim"), tested)
    measured_on = {name: (result.dataset_split, result.dataset_revision) for name, result in results.items()}
    assert measured_on == expected | {"val_mse": validated}
    row = cells(found.text)["MSE of the predicted noise (predicting zero: 1)"]
    low, high = (f"{report[f'mse_{end}']:.4g}" for end in ("low", "high"))
    assert row == [f"{report['mse']:.4g}", f"{low} to {high}", "364 test pairs"]
    assert "The samples are worse than held-out images." in found.text


def test_front_matter_has_what_hugging_face_reads(paths: Paths) -> None:
    data = render(paths).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("unknown", "onnx", "unconditional-image-generation")
    assert (data.tags, data.datasets, data.model_name) == (["diffusion", "ddpm"], ["digits"], "ddpm-digits")


def test_data_and_files_have_their_digests_and_license(paths: Paths) -> None:
    rows = cells(render(paths).text)
    scored = json.loads((paths.evaluation / "scored.json").read_text())
    expected = {
        "source": "data/raw/digits.npz",
        "license": "CC-BY-4.0",
        "origin": "<https://doi.org/10.24432/C50P49>",
        "images": "1,452 train, 163 val, 182 test",
        "size": "8x8, from 8x8",
        "SHA-256 of data/pairs/manifest.json": f"`{sha256(paths.pairs / 'manifest.json')}`",
        "SHA-256 of data/shards/manifest.json": f"`{sha256(paths.shards / 'manifest.json')}`",
        "SHA-256 of the test pairs that were scored": f"`{scored['pairs_sha256']}`",
        "`model.safetensors`, from which the others were made": f"`{sha256(paths.model / 'model.safetensors')}`",
        "`sampler.onnx`": f"`{'5' * 64}`",
    }
    assert {name: rows[name] for name in expected} == {name: [value] for name, value in expected.items()}


def test_secrets_of_the_source_are_left_out_and_so_are_names_that_the_hub_refuses(paths: Paths) -> None:
    known = card._read(paths, paths.model)
    images = known.shards | {"source": "https://example.org/my pictures.zip?signature=secret"}
    assert card._data(replace(known, shards=images), None)["source"] == "https://example.org/my pictures.zip"
    manifest = paths.shards / "manifest.json"
    write_json(manifest, json.loads(manifest.read_text()) | {"source": images["source"]})
    pairs = paths.pairs / "manifest.json"
    write_json(pairs, json.loads(pairs.read_text()) | {"shards_sha256": sha256(manifest)})
    write_sums(paths.pairs)
    record = json.loads(paths.made_with("train").read_text())
    record["read"]["data/pairs/manifest.json"] = sha256(pairs)
    write_json(paths.made_with("train"), record)
    found = render(paths)
    assert found.data.datasets is None
    assert found.data.model_name == "ddpm-my pictures"
    assert "secret" not in found.content
    assert "# Diffusion model of my pictures\n" in found.text


def test_what_the_training_started_from_is_said_by_its_digest(paths: Paths) -> None:
    assert "The training started from" not in render(paths).text
    record = json.loads(paths.made_with("train").read_text())
    record["params"]["train.start_from"] = "calm-owl"
    record["read"]["data/models/calm-owl/model.safetensors"] = "7" * 64
    write_json(paths.made_with("train"), record)
    said = f"The training started from the model `calm-owl`, whose `model.safetensors` has the SHA-256 `{'7' * 64}`."
    assert said in render(paths).text


def test_what_was_found_in_the_data_is_said(paths: Paths) -> None:
    known = card._read(paths, paths.model)
    found = {"rejected": [{}] * 1200, "copies": 1, "near_duplicates": [{"images": 2}, {"images": 3}]}
    assert card._data(known, None)["remarks"] == ""
    assert card._data(replace(known, shards=known.shards | found), None)["remarks"] == (
        "Found in the data: 1,200 rejected files, 1 exact copy, 5 near-duplicates in different splits."
    )


def test_the_training_is_described(paths: Paths) -> None:
    text = render(paths).text
    assert (
        "Network `unet` with 13,500 parameters, trained for 40 steps on digits. It generates greyscale images" in text
    )
    lines = text.splitlines()
    for line in ("- `train.batch_size`: `32`", "- `process.learned_variance`: `false`", "- `network.patch_size`: `2`"):
        assert lines.count(line) == 1


def test_without_a_license_the_card_says_so(paths: Paths) -> None:
    paths.licenses.unlink()
    rows = cells(render(paths).text)
    assert rows["license"] == ["not stated; `ddpm import --license` records it"]
    assert "origin" not in rows


def test_other_weights_get_no_figures_and_no_data(paths: Paths) -> None:
    (paths.model / "model.safetensors").write_bytes(b"imported")
    write_sums(paths.model)
    found = render(paths)
    assert "Not known: these weights were not evaluated." in found.text
    assert "Not known: the model was not trained here on the data that are here now." in found.text
    assert "its training is not known" in found.text
    assert found.data.eval_results is None
    assert (found.data.metrics, found.data.datasets) == (None, None)
    assert "0.4" not in found.text  # no figure of the former weights


@pytest.mark.parametrize("part", ["pairs", "shards"])
def test_other_data_than_those_of_the_training_are_not_described(paths: Paths, part: str) -> None:
    manifest = paths.root / "data" / part / "manifest.json"
    write_json(manifest, json.loads(manifest.read_text()) | {"classes": []})
    assert "Not known: the model was not trained here on the data" in render(paths).text


@pytest.mark.parametrize("file", ["reports/evaluate.json", "reports/train.json", "models/ddpm/config.json"])
def test_damaged_results_are_refused(paths: Paths, file: str) -> None:
    path = paths.root / file
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(UserError, match=r"damaged"):
        render(paths)


def test_the_team_writes_use_limits_and_license(paths: Paths) -> None:
    paths.card_text.write_text(
        "---\nlicense: apache-2.0\ntags: [toy, ddpm]\nlanguage: en\n---\n\n## Intended use\n\nFun.\n"
    )
    found = render(paths)
    assert (found.data.license, found.data.tags) == ("apache-2.0", ["diffusion", "ddpm", "toy"])
    assert found.data.language == "en"
    assert "## Intended use\n\nFun.\n" in found.text
    assert "Not stated" not in found.text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("---\nmodel-index: []\n---\n", "model-index: written by the pipeline; delete it"),
        ("---\ntags: toy\n---\n", r"tags: must be a list of names such as \[art\]"),
        ("---\ntags: [\n---\n", "not valid YAML, line"),
        ("---\nlicense: MIT\n---\n", "license: must be an identifier of the Hub, in lower case"),
        ("---\nlicense: mit\n", "the fields at its top do not end; add a line ---"),
        ("---\nlicense: !!python/object/apply:os.system [id]\n---\n", "not supported: write the value without"),
    ],
)
def test_an_invalid_text_is_refused(paths: Paths, text: str, problem: str) -> None:
    paths.card_text.write_text(text)
    with pytest.raises(UserError, match=rf"model-card\.md: .*{problem}"):
        render(paths)


def test_an_invalid_text_is_refused_before_graphs_are_built(
    whole_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole_tree, tmp_path / "tree")
    tree = Paths(tmp_path / "tree")
    tree.card_text.write_text("---\nlicense: MIT\n---\n")
    monkeypatch.setattr(export.denoiser, "to_onnx", None)
    with pytest.raises(UserError, match=r"model-card\.md: license: "):
        export.run(params.load(tree.params), tree)
    assert tree.sampler.exists()  # of the former export


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\n---\n", ({}, "")),
        ("---\nlicense: mit\n---", ({"license": "mit"}, "")),
        ("\ufeff--- \nlicense: [mit, cc0-1.0]\n--- \n\nFun.", ({"license": ["mit", "cc0-1.0"]}, "Fun.")),
        ("Fun.", ({}, "Fun.")),
    ],
)
def test_how_the_text_may_be_written(tmp_path: Path, text: str, expected: tuple[dict[str, Any], str]) -> None:
    (tmp_path / "model-card.md").write_text(text, encoding="utf-8")
    fields, body = card.team_text(tmp_path / "model-card.md")
    assert (fields, body) == (expected[0] | {"tags": []}, expected[1])


def test_a_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model-card.md").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"model-card\.md: not UTF-8 text \(byte 0\); save it as UTF-8"):
        card.team_text(tmp_path / "model-card.md")


def test_names_from_the_data_cannot_change_the_card() -> None:
    name = "cat | [x](javascript:1) <b>`\n## Limits"
    assert card.inert(name) == r"cat \| \[x\](javascript:1) \<b\>\`\\n\#\# Limits"


def test_licenses_are_kept_by_source(tmp_path: Path) -> None:
    file = tmp_path / "licenses.yaml"
    file.write_text("# Ours\ndata/raw/a:\n  license: mit # as its page says\n")
    licenses.record(file, "data/raw/b", License(license="cc0-1.0", url="https://example.org/b?id=7"))
    assert file.read_text().startswith("# Ours\ndata/raw/a:\n  license: mit # as its page says\n")
    found = licenses.read(file)
    assert found["data/raw/a"] == License(license="MIT")
    assert (found["data/raw/b"].license, found["data/raw/b"].url) == ("CC0-1.0", "https://example.org/b?id=7")
    licenses.record(file, "data/raw/b", None)  # other data of the same name
    assert set(licenses.read(file)) == {"data/raw/a"}
    file.write_text("# All were removed.\n")
    assert licenses.read(file) == {}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"license": "Public Domain"}, "license: must be an SPDX identifier such as CC-BY-4.0"),
        ({"license": "MIT", "url": "ftp://x"}, "url: must be a web address"),
        ({"license": "MIT", "url": "https://me:word@example.org/"}, "url: must not contain a password"),
        (
            {"license": "MIT", "url": "https://example.org/a|b"},
            "url: must be a web address, without spaces",
        ),
        ({"license": "MIT", "author": "me"}, "author: no such parameter"),
    ],
)
def test_invalid_licenses_are_refused(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    file = tmp_path / "licenses.yaml"
    file.write_text(json.dumps({"data/raw/a": fields}))
    with pytest.raises(UserError, match=rf"licenses\.yaml: data/raw/a\.{problem}"):
        licenses.read(file)
