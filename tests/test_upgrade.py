"""Old formats: tests/format_1 contains models, their samples and a params.yaml written in format 1."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffusion import Model
from diffusion.errors import UserError
from diffusion.model import CONFIG, read_config
from diffusion.storage.files import write_json, write_sums
from diffusion.upgrade import from_earlier
from flows import yaml_files

OLD = Path(__file__).parent / "format_1"


@pytest.mark.parametrize("name", ["unet", "uvit"])
def test_a_model_of_format_1_draws_what_it_drew_then(name: str, tmp_path: Path) -> None:
    model = Model.load(OLD / name)
    then = np.load(OLD / f"{name}.npy", allow_pickle=False).astype(int)
    now = model.sample(4, steps=5, seed=0, sampler="ddim", spacing="linspace").astype(int)
    assert np.abs(now - then).max() <= 1  # another processor may round otherwise
    model.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_bytes())["format"] == 2
    assert Model.load(tmp_path / "again").config == model.config


def test_a_model_from_before_fourier_features_has_none() -> None:
    document = read_config((OLD / "unet" / CONFIG).read_bytes()).model_dump(mode="json")
    assert document["format"] == 2
    assert document["network"].pop("fourier_features") == []
    assert read_config(json.dumps(document).encode()).network.model_dump()["fourier_features"] == ()


def test_fields_of_format_1_go_to_their_choices_or_away() -> None:
    unet, uvit = (read_config((OLD / name / CONFIG).read_bytes()).model_dump(mode="json") for name in ("unet", "uvit"))
    assert unet["process"]["weighting"] == {"kind": "min-snr", "gamma": 3.0}
    assert unet["process"]["schedule"] == "cosine"
    assert "depth" not in unet["network"]
    assert uvit["process"]["weighting"] == "simple"
    assert uvit["process"]["schedule"] == {"kind": "given", "beta": [step / 100 for step in range(1, 31)]}
    assert uvit["network"] == {
        "kind": "uvit", "base_channels": 8, "depth": 1, "conditioning": "adaln", "head_channels": 0, "patch_size": 4,
        "dropout": 0.0, "classes": False,
    }  # fmt: skip


def test_parameters_of_this_format_stay_as_they_are(root: Path) -> None:
    document = yaml_files.read_yaml(root / "params.yaml")
    assert not from_earlier(document)
    assert document == yaml_files.read_yaml(root / "params.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 3}, "format 3 is newer than this version supports (up to 2); upgrade ddpm-pipeline"),
        ({"format": "new"}, "format: input should be 2"),
        ({}, "shape: "),
        ([], "must be a section with fields (got [])"),
    ],
)
def test_what_this_version_cannot_read_is_refused(tmp_path: Path, content: object, message: str) -> None:
    shutil.copytree(OLD / "unet", tmp_path / "model")
    write_json(tmp_path / "model" / CONFIG, content)
    write_sums(tmp_path / "model")
    with pytest.raises(UserError) as caught:
        Model.load(tmp_path / "model")
    assert str(caught.value).startswith(f"{tmp_path / 'model' / CONFIG}: ")
    assert message in str(caught.value)
