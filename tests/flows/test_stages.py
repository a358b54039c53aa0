"""train, evaluate and export on the digits, with a tiny network."""

import copy
import json
import os
import shutil
import signal
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from diffusion.evaluation import wiener
from diffusion.evaluation.heldout import predictions, quick_mse
from diffusion.evaluation.noise_prediction import baselines, collect
from diffusion.export.denoiser import Step
from diffusion.model import Model, load_model
from diffusion.pairs.pairs import Pairs
from diffusion.storage.files import parse_csv
from diffusion.training import loop
from flows.paths import Paths
from tests.nn.networks import noise
from tests.rounding import assert_rounds_alike
from tests.training import trees

pytestmark = pytest.mark.slow


def read_csv(path: Path) -> list[dict[str, float]]:
    return parse_csv(path.read_bytes())


def steps(model: Model) -> dict[torch.dtype, Step]:
    """A model's sampling step in float32 and float64."""
    return {
        dtype: Step(copy.deepcopy(model.net).to(dtype), model.process.parameterization)
        for dtype in (torch.float32, torch.float64)
    }


def test_outputs_of_train(whole_tree: Path) -> None:
    report = json.loads((whole_tree / "reports/train.json").read_text())
    assert report["steps"] == 40
    assert report["images"] == 40 * 32
    assert report["augment"] == 0  # `auto`, of many images
    loss = read_csv(whole_tree / "reports/train_curves/loss.csv")
    assert [row["step"] for row in loss] == [15, 30, 40]
    assert loss[-1]["loss"] < loss[0]["loss"]
    assert [row["step"] for row in read_csv(whole_tree / "reports/train_curves/heldout.csv")] == [20, 40]
    assert sorted(path.name for path in (whole_tree / "reports/previews").iterdir()) == [
        "SHA256SUMS",
        "step-00000020.png",
        "step-00000040.png",
    ]
    model = load_model(whole_tree / "models/ddpm", torch.device("cpu"))
    assert model.shape == (1, 8, 8)
    # The saved model has the EMA weights of the last held-out measurement.
    heldout = Pairs(Paths(whole_tree).pairs, "val")
    mse = quick_mse(model, heldout, torch.device("cpu"), lambda: None).mse
    assert mse == pytest.approx(report["heldout_mse"], rel=1e-6)
    assert not any((whole_tree / ".ddpm/checkpoints").glob("*/"))


def test_evaluate_scores_the_model_on_the_stored_pairs(whole_tree: Path) -> None:
    """The error in the report can be reproduced from the files alone."""
    model = load_model(whole_tree / "models/ddpm", torch.device("cpu"))
    errors: dict[str, list[NDArray[np.float32]]] = {"val": [], "test": []}
    for split, squares in errors.items():
        pairs = Pairs(Paths(whole_tree).pairs, split)  # type: ignore[arg-type] # test, after the loop
        for draw in range(2):
            for block in range(pairs.blocks):
                t, x_t, eps = pairs.heldout(block, draw)
                at, given = torch.from_numpy(t), torch.from_numpy(x_t)
                eps_hat = model.process.parameterization.to_eps(model.net(given, at), given, at)
                squares.append(np.square(eps_hat.numpy() - eps).ravel())
    report = json.loads((whole_tree / "reports/evaluate.json").read_text())
    assert report["mse"] == pytest.approx(float(np.concatenate(errors["test"]).mean()), rel=1e-5)
    assert report["val_mse"] == pytest.approx(float(np.concatenate(errors["val"]).mean()), rel=1e-5)
    assert report["pairs"] == 2 * report["images"] == 2 * pairs.images
    assert report["mse_low"] < report["mse"] < report["mse_high"]
    bits = read_csv(whole_tree / "reports/evaluation/bits_per_dim.csv")
    assert [row["image"] for row in bits] == list(range(report["bits_per_dim_images"]))
    assert np.mean([row["bits_per_dim"] for row in bits]) == pytest.approx(report["bits_per_dim"])
    assert np.std([row["bits_per_dim"] for row in bits], ddof=1) / len(bits) ** 0.5 == pytest.approx(
        report["bits_per_dim_se"]
    )
    baseline = wiener.fit(Pairs(Paths(whole_tree).pairs, "train"))
    sums = collect(predictions(model, pairs, torch.device("cpu")), pairs.images, model.process.schedule, baseline)
    assert report["wiener_mse"] == pytest.approx(baselines(sums.by_t.sum(axis=0))["wiener_mse"])
    assert report["wiener_mse"] < report["zero_mse"]
    assert len(read_csv(whole_tree / "reports/evaluation/bands.csv")) == 10
    by_t = read_csv(whole_tree / "reports/evaluation/vlb_by_t.csv")
    assert [row["t"] for row in by_t] == list(range(100))
    total = report["bits_per_dim_prior"] + sum(row["bits_per_dim"] for row in by_t)
    assert report["bits_per_dim_exact"] == pytest.approx(total)
    assert (whole_tree / "reports/evaluation/filmstrip.png").stat().st_size > 10_000


def test_the_onnx_model_runs_without_this_code(whole_tree: Path) -> None:
    path = whole_tree / "models/onnx/denoiser.onnx"
    graph = onnx.load(path)
    assert next(opset.version for opset in graph.opset_import if opset.domain == "") == 20
    assert str(whole_tree.parent) not in str(graph)
    assert str(trees.ROOT) not in str(graph)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = load_model(whole_tree / "models/ddpm", torch.device("cpu"))
    assert [(value.name, value.type) for value in session.get_inputs()] == [
        ("x_t", "tensor(float)"),
        ("t", "tensor(int64)"),
    ]
    for size in (1, 5):
        x_t, t = noise(size, 1, 8, 8), torch.arange(99, 99 - size, -1)
        (eps_hat,) = session.run(["eps_hat"], {"x_t": x_t.numpy(), "t": t.numpy()})
        expected, float64 = (step(x_t.to(dtype), t)[0] for dtype, step in steps(model).items())
        assert_rounds_alike(torch.from_numpy(eps_hat), expected, float64)
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    assert facts["ddpm.num_timesteps"] == "100"
    assert json.loads(facts["ddpm.alpha_bar"]) == model.process.schedule.alpha_bar.tolist()
    assert (
        facts["ddpm.weights_sha256"] == sha256((whole_tree / "models/ddpm/model.safetensors").read_bytes()).hexdigest()
    )


def test_the_stages_support_other_choices(pairs_tree: Path, tmp_path: Path) -> None:
    """A class-conditional transformer with learned variance, and nothing else at its default."""
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    network = {"kind": "uvit", "base_channels": 16, "conditioning": "adaln", "depth": 1, "patch_size": 3}
    changes = {
        "process": {
            "schedule": "sigmoid",
            "num_timesteps": 50,
            "zero_terminal_snr": True,
            "parameterization": "x_0",
            "learned_variance": True,
            "weighting": "truncated-snr",
            "loss": "huber",
        },
        "network": network | {"classes": True, "dropout": 0.1},
        "train": {"steps": 50, "timesteps": "loss-second-moment", "class_dropout": 0.2, "augment": 0.3},
        "sample": {"sampler": "dpm-solver++", "spacing": "log-snr", "variance": "learned", "guidance": 2.0},
    }
    trees.change(tree, changes)
    for stage in ("pairs", "train", "evaluate", "export"):
        done = trees.run(tree, stage)
        assert done.returncode == 0, done.stderr
        assert (" images, augmented with probability 0.3, starting" in done.stderr) == (stage == "train")
    assert json.loads((tree / "reports/train.json").read_text())["augment"] == 0.3
    report = json.loads((tree / "reports/evaluate.json").read_text())
    assert 0 < report["bits_per_dim_low"] < report["bits_per_dim"] < report["bits_per_dim_high"]
    assert report["bits_per_dim_prior"] == 0  # zero terminal SNR: nothing of the image remains
    assert 0 < report["class_agreement_low"] <= report["class_agreement"] <= report["class_agreement_high"] <= 1
    assert "guidance 2" in (tree / "reports/report.html").read_text()
    session = ort.InferenceSession(tree / "models/onnx/denoiser.onnx", providers=["CPUExecutionProvider"])
    model = load_model(tree / "models/ddpm", torch.device("cpu"))
    x_t, t, y = noise(4, 1, 8, 8), torch.tensor([0, 5, 40, 49]), torch.tensor([3, -1, 9, 0])
    inputs = {"x_t": x_t.numpy(), "t": t.numpy(), "y": y.numpy()}
    found = session.run(["eps_hat", "x_0_hat"], inputs)
    expected = (step(x_t.to(dtype), t, y) for dtype, step in steps(model).items())
    for output, float32, float64 in zip(found, *expected, strict=True):
        assert_rounds_alike(torch.from_numpy(output), float32, float64)
    # The analytic variance needs no retraining.
    assert model.config.x_0_mse is not None
    trees.change(tree, {"sample": {"sampler": "ddpm", "variance": "analytic"}, "evaluate": {"quality_samples": 0}})
    done = trees.run(tree, "evaluate")
    assert done.returncode == 0, done.stderr


def test_an_imported_model_can_be_evaluated(whole_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(whole_tree, tmp_path / "tree")
    shutil.rmtree(tree / "reports")
    done = trees.run(tree, "evaluate")
    assert done.returncode == 0, done.stderr
    page = (tree / "reports/report.html").read_text()
    assert "<h2>Training</h2>" not in page
    assert "train.steps" not in page


def test_variants_are_exported_next_to_the_model(whole_tree: Path) -> None:
    for name in ("denoiser", "sampler"):
        props = onnx.load(whole_tree / f"models/onnx/{name}_int8.onnx").metadata_props
        assert {prop.key: prop.value for prop in props}["ddpm.precision"] == "int8"
    report = json.loads((whole_tree / "reports/export.json").read_text())
    assert report["int8"]["loss"] == pytest.approx(report["int8"]["mse"] / report["denoiser"]["mse"] - 1)
    assert report["bytes"]["sampler_int8"] == (whole_tree / "models/onnx/sampler_int8.onnx").stat().st_size


def test_a_failed_check_leaves_no_model(whole_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(whole_tree, tmp_path / "tree")
    trees.change(tree, {"export": {"tolerance": 1e-12, "variants": []}})
    done = trees.run(tree, "export")
    assert done.returncode == 1
    assert "more than export.tolerance (1e-12)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tree / "models/onnx").exists()


def test_a_resumed_training_gives_the_same_bytes(pairs_tree: Path, whole_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    trees.stopped(tree, 21)
    again = trees.run(tree, "train")
    assert again.returncode == 0, again.stderr
    assert "resuming from step 21" in again.stderr
    records = tuple(f"reports/made_with/{stage}" for stage in ("shard", "pairs", "train"))
    made = ("models/ddpm", "reports/data", "reports/train", "reports/prev", *records)
    trained = trees.digests(whole_tree, "models", "reports")
    assert trees.digests(tree, "models", "reports") == {
        name: digest for name, digest in trained.items() if name.startswith(made)
    }


def test_sigterm_writes_a_checkpoint(pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree", steps=100_000)
    with trees.start(tree) as process:
        trees.wait_for(process, "step 20: held-out")
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert list((tree / ".ddpm/checkpoints").glob("*/*.safetensors"))
    assert not (tree / "models").exists()


def test_pairs_of_another_process_are_rejected(pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    trees.change(tree, {"process": {"num_timesteps": 500}, "sample": {"steps": 100}})
    done = trees.run(tree, "train")
    assert done.returncode == 1
    assert "the pairs (schedule cosine, 100 timesteps, images" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_does_not_end_a_stage(pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    shutil.rmtree(tree / "data/shards")
    reading, writing = os.pipe()
    os.close(reading)
    command, environment = [*trees.TRAIN[:-1], "shard"], os.environ | trees.ENVIRONMENT
    done = subprocess.run(command, cwd=tree, env=environment, stderr=writing, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert (tree / "data/shards/manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"stepz": 5}}, "params.yaml: train.stepz: no such parameter"),
        ({"train": {"steps": -1}}, "params.yaml: train.steps: input should be greater than or equal to 0 (got -1)"),
        ({"train": {"steps": 0}}, "params.yaml: train: steps and epochs are both 0: set one of them"),
        (
            {"train": {"epochs": 9}},
            "params.yaml: train: steps (40) and epochs (9) both set the length: set one of them to 0",
        ),
        (
            {"train": {"sharding": "weights", "optimizer": {"kind": "sgd", "momentum": 0.9}}},
            "params.yaml: train: sharding: weights needs an optimizer other than sgd: use adamw or muon",
        ),
        ({"process": {"schedule": "square"}}, "params.yaml: process.schedule: input should be 'linear', "),
        (
            {"process": {"beta": [0.5]}},
            "params.yaml: of an earlier version (it has process.beta); `ddpm params --update` rewrites params.yaml",
        ),
        ({"process": {"schedule": {"kind": "given", "beta": [0.5]}}}, "process: schedule.beta has 1 value, but num_"),
        (
            {"process": {"parameterization": "eps", "zero_terminal_snr": True}},
            "needs a parameterization other than eps",
        ),
        (
            {"process": {"zero_terminal_snr": True}},
            "such as snr-plus-one or truncated-snr: the last timestep",
        ),
        (
            {"process": {"schedule": {"kind": "given", "beta": [0.9] * 20}, "num_timesteps": 20}},
            "beta destroys the image before the last timestep",
        ),
        ({"process": {"weighting": "snrr"}}, "process.weighting: input should be 'simple', 'vlb', 'vlb-large', "),
        ({"network": {"conditioning": "token"}}, "network.conditioning: input should be 'add' or 'film' (got 'token')"),
        ({"sample": {"variance": "learned"}}, "params.yaml: sample.variance is learned, which needs process.learned"),
        ({"sample": {"steps": 5000}}, "params.yaml: sample.steps (5000) exceeds process.num_timesteps (100)"),
        ({"network": {"attention_levels": [2]}}, "network: attention_levels contains 2, but the levels are 0 to 0"),
        ({"device": "cuda:7"}, "device: cuda:7 is not available; set device to auto or cpu"),
    ],
)
def test_invalid_parameters_give_one_line(
    pairs_tree: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copy(pairs_tree / "params.yaml", tmp_path)
    trees.change(tmp_path, changes)
    done = trees.run(tmp_path, "train")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_damaged_inputs_give_one_line_with_advice(pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    done = trees.run(tree, "evaluate")
    assert done.returncode == 1
    assert done.stderr.endswith("models/ddpm/config.json: No such file or directory; `dvc repro train` writes it\n")
    (tree / "data/pairs/manifest.json").unlink()
    done = trees.run(tree, "train")
    assert done.returncode == 1
    assert "data/pairs/manifest.json" in done.stderr
    assert "dvc repro pairs" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("Unable to allocate 2.27 PiB"),
    ],
)
def test_running_out_of_memory_gives_advice(
    pairs_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    tree = trees.copy(pairs_tree, tmp_path / "tree")
    monkeypatch.setattr(loop, "step", fails)
    done = trees.run(tree)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ddpm train: error: out of memory ({error}); lower train.batch_size (now 32) or raise train.accumulate (now "
        "1), which splits each batch into smaller parts, or set train.recompute to true"
    )
    monkeypatch.setattr(loop, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("another one")))
    with pytest.raises(RuntimeError, match="another one"):
        trees.run(tree)
