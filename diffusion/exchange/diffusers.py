"""Export to and import from diffusers' folders: a DDPMPipeline, or for import also a bare UNet2DModel."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from diffusion import model
from diffusion.errors import UserError, describe
from diffusion.exchange import weights
from diffusion.exchange.configs import PREDICTIONS, SchedulerConfig, UNetConfig
from diffusion.nn.unet import UNet, UNetOptions, groups
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import ConsistencyOptions
from diffusion.storage.files import new_directory, write_atomic, write_json

PIPELINE, UNET, SCHEDULER = "model_index.json", "unet", "scheduler"
UNET_CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
CARD = "README.md"
WEIGHTS, PICKLE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
PIPELINES = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}
Read = TypeVar("Read", bound=BaseModel)


def export_model(
    source: Path,
    directory: Path,
    sample: SampleOptions,
    force: bool,
    card: Callable[[str, dict[str, str]], str] | None = None,
) -> str:
    """Export the model in `source` as a folder that `diffusers.DDPMPipeline.from_pretrained` loads.

    An imported model keeps its original scheduler; otherwise the scheduler is derived from `sample`. `card` returns the
    text of README.md, given the class that loads the folder and the SHA-256 of its weights by name. Returns that class
    and the sampling options that are lost. Raises UserError listing the parameters that diffusers does not support, or
    if `directory` is in use.
    """
    _check_free(directory, {PIPELINE, UNET, SCHEDULER, CARD}, force)
    loaded = model.load_model(source, torch.device("cpu"))
    net, config = loaded.net, loaded.config
    if problems := unsupported(config, sample):
        raise UserError(f"{source}: not supported by diffusers: {'; '.join(problems)}")
    assert isinstance(net, UNet)
    config_json = UNetConfig.of(config, weights.freq_shift(net)).document()
    scheduler = config.scheduler or SchedulerConfig.of(config.process, sample).document()
    name = scheduler.get("_class_name", "DDPMScheduler")
    index = {
        "_class_name": PIPELINES[name],
        "scheduler": ["diffusers", name],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with new_directory(directory) as temporary:
        write_json(temporary / PIPELINE, index)
        write_json(temporary / UNET / UNET_CONFIG, config_json)
        content = save(weights.to_diffusers(net), metadata={"format": "pt"})
        write_atomic(temporary / UNET / WEIGHTS, content)
        write_json(temporary / SCHEDULER / SCHEDULER_CONFIG, scheduler)
        if card is not None:
            text = card(PIPELINES[name], {f"{UNET}/{WEIGHTS}": hashlib.sha256(content).hexdigest()})
            write_atomic(temporary / CARD, text.encode())
    if config.scheduler:
        scheduler_note = "its scheduler is the one it was imported with, regardless of the section sample"
    else:
        scheduler_note = settings_not_kept(sample)
    return f"{PIPELINES[name]}.from_pretrained; {scheduler_note}"


def settings_not_kept(sample: SampleOptions) -> str:
    """The sampling options that the exported scheduler cannot express, and what replaces them."""
    steps = f"num_inference_steps={sample.steps}"
    if isinstance(sample.sampler, ConsistencyOptions):
        replaced = [f"sample.steps {sample.steps} (pass {steps}, use_clipped_model_output=True)"]
        replaced += [f"sample.sampler.gamma {sample.sampler.gamma:g} (0)"] if sample.sampler.gamma else []
        return f"not kept: {', '.join([*replaced, f'sample.spacing {sample.spacing} (trailing)'])}"
    replaced = [f"sample.steps {sample.steps} (pass {steps})"]
    if sample.sampler.kind != "ddpm":
        replaced.append(f"sample.sampler {sample.sampler.kind} (ddpm instead)")
    if sample.spacing != "linspace":
        replaced.append(f"sample.spacing {sample.spacing} (linspace)")
    if sample.variance == "analytic":
        replaced.append("sample.variance analytic (fixed-small)")
    return f"not kept: {', '.join(replaced)}"


def unsupported(config: model.Config, sample: SampleOptions) -> list[str]:
    """The parameters that prevent an export, with their values and the required ones."""
    network, process, (_, height, width) = config.network, config.process, config.shape
    predicted = process.parameterization
    if not isinstance(network, UNetOptions):
        return [f"network.kind is {network.kind}, but must be unet"]
    cell = 2 ** (len(network.channel_multipliers) - 1)
    # The analytic variance has no counterpart, but is not part of the model: fixed-small replaces it.
    variances = ["learned"] if process.learned_variance else ["fixed-small", "fixed-large", "analytic"]
    wanted: list[tuple[str, object, bool, str]] = [
        ("network.patch_size", network.patch_size, network.patch_size == 1, "1"),
        ("network.fourier_features", network.fourier_features, not network.fourier_features, "[]"),
        ("network.classes", str(network.classes).lower(), not network.classes, "false"),
        ("pairs.height", height, height % cell == 0, f"a multiple of {cell}"),
        ("pairs.width", width, width % cell == 0, f"a multiple of {cell}"),
        ("process.parameterization", predicted, predicted in PREDICTIONS, "eps, x_0 or v"),
    ]
    if not config.scheduler:
        distilled = sample.sampler.kind == "consistency"
        learned = process.learned_variance
        wanted += [
            # A DDIMScheduler does not split the network's output into prediction and variance.
            ("process.learned_variance", str(learned).lower(), not (learned and distilled), "false for consistency"),
            ("sample.variance", sample.variance, sample.variance in variances, " or ".join(variances)),
            ("sample.threshold", sample.threshold, sample.threshold != "dynamic", "clip or none"),
        ]
    return [f"{field} is {value}, but must be {must}" for field, value, holds, must in wanted if not holds]


def import_model(source: Path, directory: Path, force: bool) -> str:
    """Import the DDPMPipeline or UNet2DModel in the folder `source` as a model directory.

    Returns the scheduler's sampling settings, or the assumed ones. Raises UserError listing the settings that are not
    supported here, or if `directory` is in use.
    """
    _check_free(directory, model.FILES, force)
    # Early published models have all files in one folder.
    unet_path = (source / UNET if (source / UNET).is_dir() else source) / UNET_CONFIG
    scheduler_path = (source / SCHEDULER if (source / SCHEDULER).is_dir() else source) / SCHEDULER_CONFIG
    unet = _validated(unet_path, _read_json(unet_path), UNetConfig)
    learned = unet.out_channels > unet.in_channels
    bare = not scheduler_path.exists() and not (source / PIPELINE).exists()
    document = None if bare else _read_json(scheduler_path)
    if bare:
        scheduler = SchedulerConfig(variance_type="learned_range" if learned else "fixed_small")
    else:
        scheduler = _validated(scheduler_path, document, SchedulerConfig)
    try:
        network, process = unet.network(), scheduler.process()
    except ValidationError as error:
        raise UserError(f"{source}: converted to parameters of this pipeline: {describe(error)}") from None
    if learned != process.learned_variance:
        must = "learned_range" if learned else "fixed_small or fixed_large"
        raise UserError(f"{scheduler_path}: variance_type must be {must}, since out_channels is {unet.out_channels}")
    shape = (unet.in_channels, *unet.sample_size)
    config = model.Config(shape=shape, classes=(), network=network, process=process, x_0_mse=None, scheduler=document)
    net = model.new_network(shape, 0, network, process)
    assert isinstance(net, UNet)
    if (wanted := groups(network)) != unet.norm_num_groups:
        raise UserError(f"{unet_path}: norm_num_groups must be {wanted} for such channels (got {unet.norm_num_groups})")
    _load_weights(unet_path.parent, unet, net)
    model.save_model(directory, net, config)
    if document is None:
        return "it has no scheduler: assuming a linear schedule, 1000 timesteps and eps prediction"
    other = ", ".join(SchedulerConfig.without_counterpart(document))
    without = f"; `ddpm sample` does not support {other} (kept for export-diffusers)" if other else ""
    return f"its scheduler corresponds to {scheduler.sampling()}{without}"


def _load_weights(folder: Path, unet: UNetConfig, net: UNet) -> None:
    path, pickle = folder / WEIGHTS, folder / PICKLE
    if pickle.exists() and not path.exists():
        raise UserError(f"{pickle}: pickles can execute code and are not loaded; save it as {WEIGHTS} with diffusers")
    try:
        weights.from_diffusers(load_file(path), net, unet.freq_shift, unet.flip_sin_to_cos)
    except (OSError, SafetensorError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


def _check_free(directory: Path, ours: set[str], force: bool) -> None:
    """Raise UserError unless a folder is new, empty or, with `force`, contains nothing but `ours`."""
    if directory.is_dir():
        found = {entry.name for entry in directory.iterdir()}
        if not found or (force and found <= ours):
            return
    if directory.exists():
        raise UserError(f"{directory}: already exists; choose another folder, or replace an earlier one with --force")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({getattr(error, 'strerror', None) or error})") from None


def _validated(path: Path, document: Any, kind: type[Read]) -> Read:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from None
