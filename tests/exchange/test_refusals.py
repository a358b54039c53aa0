"""Unsupported settings are rejected with one line that names them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows import __main__
from tests.exchange import models

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPORTS: dict[str, dict[str, Any]] = {
    "network.kind is uvit, but must be unet": {
        "network": {"kind": "uvit", "conditioning": "token", "base_channels": 16}
    },
    "network.patch_size is 2, but must be 1": {"network": {"patch_size": 2}},
    "network.fourier_features is (7, 8), but must be []": {"network": {"fourier_features": [7, 8]}},
    "network.classes is true, but must be false": {"network": {"classes": True}},
    "pairs.height is 7, but must be a multiple of 2; pairs.width is 9, but must be a multiple of 2": {
        "pairs": {"height": 7, "width": 9}
    },
    "process.parameterization is mu, but must be eps, x_0 or v": {"process": {"parameterization": "mu"}},
    "sample.variance is fixed-small, but must be learned": {"process": {"learned_variance": True}},
    "process.learned_variance is true, but must be false for consistency": {
        "process": {"learned_variance": True},
        "sample": {"sampler": "consistency", "variance": "learned"},
    },
    "sample.threshold is dynamic, but must be clip or none": {"sample": {"threshold": "dynamic"}},
    "network.patch_size is 2, but must be 1; process.parameterization is mu, but must be eps, x_0 or v": {
        "network": {"patch_size": 2},
        "process": {"parameterization": "mu"},
    },
}
UNETS: dict[str, dict[str, Any]] = {
    "_class_name: input should be 'UNet2DModel' (got 'UNet2DConditionModel')": {"_class_name": "UNet2DConditionModel"},
    "act_fn: input should be 'silu' or 'swish' (got 'gelu')": {"act_fn": "gelu"},
    "add_attention: input should be True (got False)": {"add_attention": False},
    "center_input_sample: input should be False (got True)": {"center_input_sample": True},
    "class_embed_type: input should be None (got 'timestep')": {"class_embed_type": "timestep"},
    "num_class_embeds: input should be None (got 10)": {"num_class_embeds": 10},
    "mid_block_scale_factor: input should be 1 (got 1.41)": {"mid_block_scale_factor": 1.41},
    "time_embedding_type: input should be 'positional' (got 'fourier')": {"time_embedding_type": "fourier"},
    "down_block_types.0: input should be 'DownBlock2D' or 'AttnDownBlock2D' (got 'SkipDownBlock2D')": {
        "down_block_types": ["SkipDownBlock2D", "DownBlock2D"]
    },
    "up_block_types must be AttnUpBlock2D, UpBlock2D": {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
    "block_out_channels must be multiples of 128": {"block_out_channels": [128, 192]},
    "down_block_types must have 3 entries, as block_out_channels": {
        "block_out_channels": [128, 128, 128],
        "sample_size": 8,
    },
    "sample_size: must be the height and width of the images": {"sample_size": None},
    "sample_size must be multiples of 2": {"sample_size": [8, 7]},
    "downsample_padding and norm_eps must be 0 and 1e-06, or 1 and 1e-05": {"norm_eps": 1e-6},
    "attn_norm_num_groups must be 32": {"resnet_time_scale_shift": "scale_shift"},
    "norm_num_groups must be 32 for such channels (got 16)": {"norm_num_groups": 16},
    "dropout: input should be less than 1 (got 2); act_fn: input should be 'silu' or 'swish' (got 'gelu')": {
        "act_fn": "gelu",
        "dropout": 2,
    },
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "_class_name: input should be 'DDPMScheduler' or 'DDIMScheduler' (got 'ScoreSdeVeScheduler')": {
        "_class_name": "ScoreSdeVeScheduler"
    },
    "beta_schedule: input should be 'linear', 'scaled_linear', 'squaredcos_cap_v2' or 'sigmoid' (got 'laplace')": {
        "beta_schedule": "laplace"
    },
    "variance_type must be fixed_small or fixed_large, since out_channels is 1": {"variance_type": "learned_range"},
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare UNet2DModel; read-only."""
    folder = tmp_path_factory.mktemp("published")
    models.unet().save_pretrained(folder)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The command's error line, without the command's name."""
    capsys.readouterr()
    assert __main__.main(arguments) == 1
    said = capsys.readouterr()
    assert not said.out
    (line,) = said.err.splitlines()
    return line.removeprefix(f"ddpm {arguments[0]}: error: ")


@pytest.mark.parametrize(("reason", "changes"), EXPORTS.items(), ids=EXPORTS)
def test_models_without_a_counterpart_are_not_exported(
    tree: Path, capsys: pytest.CaptureFixture[str], reason: str, changes: dict[str, Any]
) -> None:
    chosen = models.settings(**changes)
    models.save(tree / "models" / "ddpm", chosen, classes=("a", "b"))
    (tree / "params.yaml").write_text(chosen.model_dump_json())
    assert refusal(capsys, "export-diffusers", "out") == f"models/ddpm: not supported by diffusers: {reason}"
    assert sorted(path.name for path in tree.iterdir()) == ["models", "params.yaml"]


@pytest.mark.parametrize(("reason", "changes"), UNETS.items(), ids=UNETS)
def test_networks_without_a_counterpart_are_not_imported(
    tree: Path, published: Path, capsys: pytest.CaptureFixture[str], reason: str, changes: dict[str, Any]
) -> None:
    config = json.loads((published / "config.json").read_text()) | changes
    (tree / "unet").mkdir()
    (tree / "unet" / "config.json").write_text(json.dumps(config))
    assert refusal(capsys, "import-diffusers", ".") == f"unet/config.json: {reason}"
    assert not (tree / "models").exists()


@pytest.mark.parametrize(("reason", "changes"), SCHEDULERS.items(), ids=SCHEDULERS)
def test_schedulers_without_a_counterpart_are_not_imported(
    tree: Path, published: Path, capsys: pytest.CaptureFixture[str], reason: str, changes: dict[str, Any]
) -> None:
    (tree / "config.json").write_text((published / "config.json").read_text())
    (tree / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"} | changes))
    assert refusal(capsys, "import-diffusers", ".") == f"scheduler_config.json: {reason}"


def test_settings_that_contradict_each_other_are_not_imported(
    tree: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "config.json").write_text((published / "config.json").read_text())
    (tree / "scheduler_config.json").write_text(json.dumps({"rescale_betas_zero_snr": True}))
    said = refusal(capsys, "import-diffusers", ".")
    assert said.startswith(".: converted to parameters of this pipeline: zero_terminal_snr needs a parameterization")


def test_files_that_are_missing_or_wrong(tree: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = "not a readable JSON file (No such file or directory)"
    assert refusal(capsys, "import-diffusers", "nowhere") == f"nowhere/config.json: {missing}"
    (tree / "config.json").write_text("{")
    assert refusal(capsys, "import-diffusers", ".").startswith("config.json: not a readable JSON file (")
    (tree / "config.json").write_text((published / "config.json").read_text())
    assert "No such file" in refusal(capsys, "import-diffusers", ".")
    (tree / "diffusion_pytorch_model.bin").touch()
    pickle = "diffusion_pytorch_model.bin: pickles can execute code and are not loaded; save it as"
    assert refusal(capsys, "import-diffusers", ".") == f"{pickle} {WEIGHTS} with diffusers"
    (tree / WEIGHTS).write_bytes(b"no weights")
    assert refusal(capsys, "import-diffusers", ".").startswith(f"{WEIGHTS}: ")


def test_weights_that_do_not_fit(tree: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "config.json").write_text((published / "config.json").read_text())
    weights = load_file(published / WEIGHTS)
    for change, reason in (
        (
            {"conv_in.weight": torch.zeros(3)},
            "the tensor conv_in.weight has shape (3,), but config.json implies (32, 1, 3, 3)",
        ),
        ({"more": torch.zeros(3)}, "the tensor more is unexpected: config.json implies no such layer"),
        ({"conv_out.bias": torch.tensor([torch.nan])}, "the tensor conv_out.bias contains NaN or infinite values"),
    ):
        save_file(weights | change, tree / WEIGHTS)
        assert refusal(capsys, "import-diffusers", ".") == f"{WEIGHTS}: {reason}"
    save_file({name: tensor for name, tensor in weights.items() if name != "conv_out.bias"}, tree / WEIGHTS)
    assert refusal(capsys, "import-diffusers", ".") == f"{WEIGHTS}: the tensor conv_out.bias is missing"
