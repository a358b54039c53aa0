"""The distilled model in `ddpm sample` and `ddpm export-diffusers`, with a tiny network of random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from numpy.typing import NDArray

from diffusion.distillation.sampling import student_sampling
from diffusion.model import load_model
from diffusion.process.build import ProcessOptions
from diffusion.samples import draw_samples
from diffusion.sampling.sampler import ConsistencyOptions
from flows.__main__ import main
from flows.params import Params
from flows.yaml_files import read_yaml, write_yaml
from tests.exchange import models

CPU = torch.device("cpu")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def chosen() -> Params:
    settings = models.settings()
    distill = settings.distill.model_copy(update={"sampling_steps": 3})
    return settings.model_copy(update={"seed": 3, "device": "cpu", "distill": distill})


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Params) -> Path:
    """A working tree, and the current directory, with a student and without its teacher."""
    models.save(tmp_path / "models" / "student", chosen)
    write_yaml(tmp_path / "params.yaml", chosen.model_dump(mode="json"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(*arguments: str) -> NDArray[np.uint8]:
    """What the command makes, (N, H, W, C)."""
    assert main(["sample", "--out", "made.npz", "--count", "3", *arguments]) == 0
    with np.load("made.npz") as arrays:
        return arrays["images"]


def expected(tree: Path, chosen: Params, steps: int, **changes: Any) -> NDArray[np.uint8]:
    options = student_sampling(chosen.sample, steps).model_copy(update={"count": 3} | changes)
    return draw_samples(load_model(tree / "models" / "student", CPU), options, 3, CPU).transpose(0, 2, 3, 1)


def test_the_student_samples_as_it_was_distilled(tree: Path, chosen: Params, capsys: Capture) -> None:
    assert chosen.sample.sampler.kind != "consistency"
    assert np.array_equal(pictures("--student"), expected(tree, chosen, 3))
    # Options override what the student has.
    assert np.array_equal(pictures("--student", "--steps", "1"), expected(tree, chosen, 1))
    fresh = {"sampler": ConsistencyOptions(gamma=1.0)}
    assert np.array_equal(pictures("--student", "--gamma", "1"), expected(tree, chosen, 3, **fresh))
    assert not np.array_equal(expected(tree, chosen, 3, **fresh), expected(tree, chosen, 3))
    # Another folder, sampled alike.
    (tree / "models" / "student").rename(tree / "former")
    capsys.readouterr()
    assert main(["sample", "--student"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("ddpm sample: error: models/student")
    assert line.endswith("; `dvc repro distill/dvc.yaml:distill` writes it\n")
    assert pictures("--student", "--model", "former").shape[0] == 3


def test_a_student_is_not_guided(tree: Path, chosen: Params, capsys: Capture) -> None:
    with_classes = chosen.network.model_copy(update={"classes": True})
    chosen = chosen.model_copy(update={"network": with_classes})
    models.save(tree / "models" / "student", chosen, ("a", "b"))
    assert main(["sample", "--student", "--guidance", "2"]) == 2
    line = "--guidance: the sampler consistency is for distilled models, which have it built in; use 1"
    assert capsys.readouterr().err.splitlines()[-1].endswith(line)
    assert pictures("--student", "--guidance", "1").shape[0] == 3


def test_the_number_of_steps_that_is_wrong_is_named(tree: Path, chosen: Params, capsys: Capture) -> None:
    document = read_yaml(tree / "params.yaml")
    document["distill"]["sampling_steps"] = 17
    write_yaml(tree / "params.yaml", document)
    assert main(["sample", "--student"]) == 1
    assert capsys.readouterr().err.startswith("ddpm sample: error: params.yaml: distill.sampling_steps: ")
    document["distill"]["sampling_steps"] = 5
    write_yaml(tree / "params.yaml", document)
    process = ProcessOptions.model_validate(chosen.process.model_dump() | {"num_timesteps": 4, "schedule": "cosine"})
    models.save(tree / "models" / "student", chosen.model_copy(update={"process": process}))
    assert main(["sample", "--student"]) == 1
    limit = "must be at most 4, the model's number of timesteps (got 5)"
    assert capsys.readouterr().err == f"ddpm sample: error: params.yaml: distill.sampling_steps {limit}\n"


def test_the_student_goes_to_diffusers_with_its_sampler(tree: Path, capsys: Capture) -> None:
    assert main(["export-diffusers", "out"]) == 1
    assert "models/ddpm" in capsys.readouterr().err
    assert main(["export-diffusers", "out", "--student"]) == 0
    said = capsys.readouterr().out
    assert "DDIMPipeline.from_pretrained" in said
    assert "num_inference_steps=3" in said
    trained = load_model(tree / "models" / "student", CPU)
    net = DDIMPipeline.from_pretrained("out", local_files_only=True).unet.eval()
    ours = models.outputs(trained.net, trained.shape)
    torch.testing.assert_close(models.outputs(net, trained.shape), ours, **models.CLOSE)
