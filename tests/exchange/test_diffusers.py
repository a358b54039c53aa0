"""Export to diffusers and back, with outputs compared to those of diffusers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.sampling import build as sampling
from diffusion.sampling.sampler import sample
from flows import __main__, params, presets, yaml_files
from tests.exchange import models

pytestmark = pytest.mark.slow

EXPORTS: dict[str, dict[str, Any]] = {
    "as many groups as in the paper": {"network": {"base_channels": 128}},
    "film": {"network": {"conditioning": "film"}},
    "attention everywhere, in heads": {"network": {"attention_levels": [0, 1], "head_channels": 8}},
    "attention in the middle alone": {"network": {"attention_levels": [], "blocks_per_level": 2}},
    "diffusers' convention, dropout": {"network": {"convention": "diffusers", "dropout": 0.1}},
    "the authors' frequencies": {"network": {"convention": "ho-2020"}},
    "growing, RGB, not square": {
        "network": {"channel_multipliers": [1, 2]},
        "pairs": {"channels": 3, "height": 4, "width": 6},
    },
    "one level": {"network": {"channel_multipliers": [1], "attention_levels": [0]}},
    "learned variance": {"process": {"learned_variance": True}, "sample": {"variance": "learned"}},
}
IMPORTS: dict[str, dict[str, Any]] = {
    "diffusers' defaults": {},
    "as the authors' code": {
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "block_out_channels": (128, 128),  # its 32 groups have at least four channels
    },
    "film": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "RGB, not square, other blocks": {
        "sample_size": (8, 4),
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 32, 32),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
    "growing, with attention in the middle alone": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D",) * 2,
    }
    | {"up_block_types": ("UpBlock2D",) * 2},
    "cosines first, with a shift": {"freq_shift": 1, "flip_sin_to_cos": True},
    "deeper, half the channels a head": {"layers_per_block": 2, "attention_head_dim": 16},
}

SAMPLED: dict[str, dict[str, Any]] = {
    "eps": {"sample": {"variance": "fixed-large"}},
    "v, given beta, nothing left at the end": {
        "process": {
            "schedule": "sigmoid",
            "parameterization": "v",
            "zero_terminal_snr": True,
            "weighting": "snr-plus-one",
        }
    },
    "x_0, learned variance": {
        "process": {"schedule": "cosine", "parameterization": "x_0", "learned_variance": True},
        "sample": {"variance": "learned"},
    },
    "not clipped": {"process": {"schedule": "scaled-linear", "parameterization": "v"}, "sample": {"threshold": "none"}},
}


def run(*arguments: object) -> None:
    assert __main__.main([str(argument) for argument in arguments]) == 0


def export(tree: Path, chosen: params.Params) -> Any:
    """The model in `tree`/models/ddpm through `ddpm export-diffusers` and diffusers."""
    (tree / "params.yaml").write_text(chosen.model_dump_json())
    run("export-diffusers", tree / "exported")
    return DiffusionPipeline.from_pretrained(tree / "exported", local_files_only=True)


class Sines(nn.Module):
    """Sinusoidal features of t (B,), sines first: float64 (B, E), which diffusers computes in float32."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def pictures(pipeline: Any, steps: int, **options: bool) -> Tensor:
    """Two images of a pipeline, (2, C, H, W), values 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    drawn = torch.Generator().manual_seed(3)
    made = pipeline(2, drawn, num_inference_steps=steps, output_type="pt", **options).images
    return torch.as_tensor(made)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", EXPORTS.values(), ids=EXPORTS)
def test_diffusers_computes_what_was_exported(tree: Path, changes: dict[str, Any]) -> None:
    chosen = models.settings(**changes)
    trained = models.save(tree / "models" / "ddpm", chosen)
    pipeline = export(tree, chosen)
    ours = models.outputs(trained.net, trained.shape)
    assert ours.std() > 0.1
    torch.testing.assert_close(models.outputs(pipeline.unet.eval(), trained.shape), ours, **models.CLOSE)
    assert pipeline.unet.config.dropout == chosen.network.dropout


@pytest.mark.parametrize("changes", IMPORTS.values(), ids=IMPORTS)
def test_an_imported_network_computes_what_it_did(tree: Path, changes: dict[str, Any]) -> None:
    unet = models.unet(**changes)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tree / "published")
    run("import-diffusers", tree / "published")
    adopted = models.load(tree / "models" / "ddpm")
    theirs = models.outputs(unet, adopted.shape)
    assert theirs.std() > 0.1
    torch.testing.assert_close(models.outputs(adopted.net, adopted.shape), theirs, **models.CLOSE)
    # And back again: the frequencies that it brought are kept.
    back = export(tree, models.settings())
    torch.testing.assert_close(models.outputs(back.unet, adopted.shape), theirs, **models.CLOSE)


def test_the_papers_cifar10_network_converts_both_ways(tree: Path, root: Path) -> None:
    torch.manual_seed(0)
    published = UNet2DModel(**models.DDPM_CIFAR10)
    models.randomize(published).save_pretrained(tree / "published")
    run("import-diffusers", tree / "published")
    adopted = models.load(tree / "models" / "ddpm")
    preset = presets.load(root / "presets" / "cifar10.yaml")
    assert adopted.config.network == preset.network.model_copy(update={"dropout": 0.0})
    assert (adopted.config.process, adopted.shape) == (preset.process, (3, 32, 32))
    assert sum(parameter.numel() for parameter in adopted.net.parameters()) == 35_746_307
    smaller = (3, 16, 16)  # which it computes as well
    ours, theirs = (models.outputs(net, smaller, (512,)) for net in (adopted.net, published))
    torch.testing.assert_close(ours, theirs, **models.CLOSE)
    back = export(tree, preset)
    torch.testing.assert_close(models.outputs(back.unet, smaller, (512,)), theirs, **models.CLOSE)


def test_the_first_published_models_are_read(tree: Path) -> None:
    """All files in one folder, attention layers with old names, few fields in config.json."""
    unet = models.unet(flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None)
    unet.save_pretrained(tree / "published")
    path = tree / "published" / "config.json"
    kept = [*models.UNET, "_class_name", "flip_sin_to_cos", "freq_shift", "attention_head_dim"]
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name in kept}))
    weights = load_file(tree / "published" / "diffusion_pytorch_model.safetensors")
    for new, old in {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    save_file(weights, tree / "published" / "diffusion_pytorch_model.safetensors")
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 200, "variance_type": "fixed_large"}
    (tree / "published" / "scheduler_config.json").write_text(json.dumps(scheduler))

    run("import-diffusers", tree / "published", "--out", tree / "adopted")
    adopted = models.load(tree / "adopted")
    assert adopted.config.process.num_timesteps == 200
    ours, theirs = (models.outputs(net, adopted.shape, (0, 128)) for net in (adopted.net, unet))
    torch.testing.assert_close(ours, theirs, **models.CLOSE)


@pytest.mark.parametrize("changes", SAMPLED.values(), ids=SAMPLED)
def test_the_pipeline_samples_as_ours_does(tree: Path, changes: dict[str, Any]) -> None:
    steps = 6
    chosen = models.settings(**yaml_files.overlay({"sample": {"steps": steps}}, changes))
    trained = models.save(tree / "models" / "ddpm", chosen)
    pipeline = export(tree, chosen)
    # In float64, but for what diffusers has in float32 alone: there ours, compared by separate tests.
    trained.net.double()
    pipeline.unet.double().time_proj = Sines(trained.net.conditions.time.frequencies)
    pipeline.scheduler.alphas_cumprod = trained.process.schedule.alpha_bar
    theirs = pictures(pipeline, steps)

    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(2, *trained.shape, generator=generator, dtype=torch.float64) for _ in range(steps + 1)]
    timesteps = sampling.sampling_timesteps(chosen.sample, trained.process.schedule)
    assert pipeline.scheduler.timesteps.tolist() == timesteps
    ours = sample(trained.sampler(chosen.sample), drawn.__getitem__, timesteps)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-9, rtol=0)
    assert ours.std() > 0.1


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
def test_a_distilled_model_samples_as_ours_does(tree: Path, schedule: str, gamma: float) -> None:
    """Along diffusers' own timesteps; with gamma 1 as docs/diffusers.md describes it."""
    sample_options = {"sampler": {"kind": "consistency", "gamma": gamma}, "spacing": "angle", "steps": 2}
    chosen = models.settings(sample=sample_options, process={"schedule": schedule, "parameterization": "v"})
    trained = models.save(tree / "models" / "ddpm", chosen)
    pipeline = export(tree, chosen)
    assert (type(pipeline), type(pipeline.scheduler)) == (DDIMPipeline, DDIMScheduler)
    T, given = chosen.process.num_timesteps, {"use_clipped_model_output": True}
    if gamma:
        lcm = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=T)
        pipeline, given = DDPMPipeline(pipeline.unet, lcm), {}
    trained.net.double()
    pipeline.unet.double().time_proj = Sines(trained.net.conditions.time.frequencies)
    pipeline.scheduler.alphas_cumprod = trained.process.schedule.alpha_bar
    theirs = pictures(pipeline, 2, **given)
    timesteps = [T - 1, T // 2 - 1]
    assert pipeline.scheduler.timesteps.tolist() == timesteps
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(2, *trained.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    ours = sample(trained.sampler(chosen.sample), drawn.__getitem__, timesteps)
    # A LCMScheduler mixes 1 part in 10^7 of x_t into x_0_hat.
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-6 if gamma else 1e-9, rtol=0)
    assert ours.std() > 0.1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' use of it
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_schedulers_made_from_the_exported_one_take_our_timesteps(
    tree: Path, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of docs/diffusers.md, with beta in the file, in a loop as there."""
    given = {"sampler": {"kind": "consistency", "gamma": gamma}, "spacing": "angle", "steps": 4}
    chosen = models.settings(sample=given, process={"schedule": "sigmoid", "parameterization": "v"})
    trained = models.save(tree / "models" / "ddpm", chosen)
    config = export(tree, chosen).scheduler.config
    timesteps = sampling.sampling_timesteps(chosen.sample, trained.process.schedule)
    if gamma:
        scheduler = LCMScheduler.from_config(config, original_inference_steps=chosen.process.num_timesteps)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=1, thresholding=True)
    scheduler.alphas_cumprod = trained.process.schedule.alpha_bar
    scheduler.set_timesteps(timesteps=timesteps)
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(2, *trained.shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    remaining = iter(drawn[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(remaining))
    trained.net.double()
    x_t = drawn[0]
    for t in timesteps:
        x_t = scheduler.step(trained.net(x_t, torch.full((2,), t)), t, x_t).prev_sample
    ours = sample(trained.sampler(chosen.sample), drawn.__getitem__, timesteps)
    torch.testing.assert_close(x_t, ours, atol=1e-5, rtol=0)
    assert ours.std() > 0.1


SCHEDULERS: dict[str, Any] = {
    "defaults": DDPMScheduler(),
    "trailing, wider range": DDPMScheduler(timestep_spacing="trailing", clip_sample_range=2.0),
    "thresholds": DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5),
    "large variance, not clipped": DDPMScheduler(variance_type="fixed_large", clip_sample=False),
    "log": DDPMScheduler(variance_type="fixed_small_log", beta_schedule="squaredcos_cap_v2"),
    "nothing left at the end": DDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "DDIM": DDIMScheduler(steps_offset=1, set_alpha_to_one=False),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_an_imported_scheduler_is_exported_as_it_was(
    tree: Path, scheduler: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its settings, and so the images, regardless of the sampling options in params.yaml."""
    published = (DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline)(models.unet(), scheduler)
    published.save_pretrained(tree / "published")
    run("import-diffusers", tree / "published")
    back = export(tree, models.settings(sample={"variance": "learned"}, process={"learned_variance": True}))
    assert "its scheduler is the one it was imported with" in capsys.readouterr().out
    assert type(back.scheduler) is type(scheduler)
    theirs, ours = (
        {name: value for name, value in each.config.items() if name[0] != "_"} for each in (scheduler, back.scheduler)
    )
    assert ours == theirs
    for pipeline in (published, back):
        pipeline.unet.double()
    expected = pictures(published, 8)
    torch.testing.assert_close(pictures(back, 8), expected, atol=1e-9, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (
            {"sampler": "dpm-solver++", "spacing": "log-snr", "variance": "analytic", "steps": 7},
            "DDPMPipeline.from_pretrained; not kept: sample.steps 7 (pass num_inference_steps=7), sample.sampler "
            "dpm-solver++ (ddpm instead), sample.spacing log-snr (linspace), sample.variance analytic (fixed-small)\n",
        ),
        (
            {"sampler": {"kind": "consistency", "gamma": 0.5}, "spacing": "angle", "variance": "analytic", "steps": 2},
            "DDIMPipeline.from_pretrained; not kept: sample.steps 2 (pass num_inference_steps=2, "
            "use_clipped_model_output=True), sample.sampler.gamma 0.5 (0), sample.spacing angle (trailing)\n",
        ),
        (
            {"sampler": "consistency", "spacing": "angle", "steps": 1},
            "(pass num_inference_steps=1, use_clipped_model_output=True), sample.spacing angle (trailing)\n",
        ),
    ],
)
def test_the_export_names_what_a_scheduler_cannot_express(
    tree: Path, sample: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = models.settings(sample=sample)
    models.save(tree / "models" / "ddpm", chosen)
    export(tree, chosen)
    assert capsys.readouterr().out.endswith(expected)


def test_a_folder_in_use_is_replaced_only_on_request(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = models.settings()
    models.save(tree / "models" / "ddpm", chosen)
    export(tree, chosen)
    (tree / "exported" / "mine").touch()
    assert __main__.main(["export-diffusers", "exported"]) == 1
    assert __main__.main(["import-diffusers", "exported"]) == 1
    said = capsys.readouterr().err.splitlines()
    ending = "already exists; choose another folder, or replace an earlier one with --force"
    assert said[-2:] == [
        f"ddpm export-diffusers: error: exported: {ending}",
        f"ddpm import-diffusers: error: models/ddpm: {ending}",
    ]
    run("import-diffusers", "exported", "--force")
    # What holds more than a pipeline is kept in any case.
    assert __main__.main(["export-diffusers", "exported", "--force"]) == 1
    (tree / "exported" / "mine").unlink()
    run("export-diffusers", "exported", "--force")
    assert __main__.main(["export-diffusers", "models", "--force"]) == 1
    models.load(tree / "models" / "ddpm")
