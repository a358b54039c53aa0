"""Checks that ONNX Runtime and PyTorch agree."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from diffusion.errors import UserError, counted
from diffusion.evaluation.heldout import Prediction, predictions
from diffusion.export import golden, runtime
from diffusion.model import Model
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import to_uint8
from diffusion.process.bands import BANDS, band_edges, band_of
from diffusion.progress import Progress, say
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import sample

BATCH_SIZES = (1, 7, 64)
ALL_SIZES_BLOCKS = 4
"""Number of blocks of pairs to run in every batch size; the other blocks are run whole."""
IMAGES = 64
MAX_BATCHES = 8
"""Maximum number of batches of each size."""
MAX_NOISE = 2**26
"""Bytes of the steps' noise in memory at a time: with many steps, fewer images are sampled together."""
MAX_OFF_BY_ONE = 1e-3
"""Maximum fraction of pixel values that may differ, by one grey level (of 255)."""


def session(content: bytes, device: torch.device, required: bool = True) -> ort.InferenceSession:
    """Create an ONNX Runtime session for a model's bytes, on `device` if it is the CPU or a CUDA GPU.

    If ONNX Runtime cannot use that GPU, raises UserError, or falls back to the CPU if the GPU is not `required`. For
    other devices it falls back to the CPU.
    """
    created = runtime.session(content, (device.index or 0) if device.type == "cuda" else None)
    if device.type != "cpu" and created.get_providers()[0] != runtime.CUDA:
        if required and device.type == "cuda":
            raise UserError(f"device: ONNX Runtime cannot use {device}; set device to auto or cpu")
        say(f"ONNX Runtime cannot use {device}; running the graph on the CPU")
    return created


def check_denoiser(
    denoiser: ort.InferenceSession, model: Model, pairs: Pairs, tolerance: float, stage: str = "export"
) -> dict[str, float | int | list[float | None]]:
    """Run all pairs of a held-out split through ONNX Runtime and PyTorch; `model` must be on the CPU.

    `stage` is its name, for the progress. Returns the differences of eps_hat, overall and by band of t (None where
    there are no pairs), and ONNX Runtime's held-out MSE. Raises UserError if a value of eps_hat differs by more than
    `tolerance`, if x_0_hat and eps_hat are inconsistent with x_t by more than that, or if the relative difference of
    the MSE exceeds it.
    """
    T = model.process.schedule.num_timesteps
    by_band, total, values, count = np.full(BANDS, np.nan), 0.0, 0, 0
    apart, errors = 0.0, {"onnx": 0.0, "torch": 0.0}
    with Progress(stage, pairs.images * pairs.manifest.heldout_draws, "pairs") as progress:
        for number, prediction in enumerate(predictions(model, pairs, torch.device("cpu"))):
            length = len(prediction.t)
            for size in BATCH_SIZES if number < ALL_SIZES_BLOCKS else BATCH_SIZES[-1:]:
                eps_hat, x_0_hat = _in_batches(denoiser, prediction, size)
                difference = np.abs(eps_hat - prediction.eps_hat)
                np.fmax.at(by_band, band_of(prediction.t, T), difference.max(axis=(1, 2, 3)))
                total, values = total + float(difference.sum()), values + difference.size
                alpha_bar = model.process.schedule(torch.from_numpy(prediction.t)).numpy()
                x_t = np.sqrt(alpha_bar) * x_0_hat + np.sqrt(1 - alpha_bar) * eps_hat
                apart = max(apart, float(np.abs(x_t - prediction.x_t).max()))
            for name, found in (("onnx", eps_hat), ("torch", prediction.eps_hat)):
                errors[name] += float(np.square(found - prediction.eps, dtype=np.float64).sum())
            count += length
            progress.advance(length)
    mse = {name: error / (count * prediction.eps[0].size) for name, error in errors.items()}
    largest, allowed = float(np.nanmax(by_band)), f"export.tolerance ({tolerance:g})"
    problem = ""
    if not largest <= tolerance:
        band, edges = int(np.nanargmax(by_band)), band_edges(T)
        where = f"at t from {edges[band]} to {edges[band + 1] - 1}"
        problem = f"ONNX Runtime differs from PyTorch by up to {largest:.2e} {where}, more than"
    elif not apart <= tolerance:
        problem = f"x_0_hat and eps_hat do not add up to x_t, by up to {apart:.2e}, more than"
    elif not abs(mse["onnx"] - mse["torch"]) <= tolerance * mse["torch"]:
        both = f"{mse['onnx']:.6f} in ONNX Runtime and {mse['torch']:.6f} in PyTorch"
        problem = f"the held-out MSE is {both}, a relative difference above"
    if problem:
        raise UserError(f"denoiser.onnx: {problem} {allowed}; no model was written")
    return {
        "max_difference": largest,
        "max_difference_by_band": [None if np.isnan(value) else float(value) for value in by_band],
        "mean_difference": total / values,
        "pairs": count,
        "mse": mse["onnx"],
    }


def _in_batches(denoiser: ort.InferenceSession, given: Prediction, size: int) -> Iterator[NDArray[np.float64]]:
    """Compute eps_hat and x_0_hat of a prediction's pairs, each (n, C, H, W), in batches of a given size."""
    starts, inputs = range(0, len(given.t), size), golden.names(denoiser)
    feeds = ({name: getattr(given, name)[start : start + size] for name in inputs} for start in starts)
    parts = [denoiser.run(["eps_hat", "x_0_hat"], feed) for feed in feeds]
    return (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))


def check_sampler(sampler: ort.InferenceSession, model: Model, options: SampleOptions) -> dict[str, float | int]:
    """Sample images in ONNX Runtime and PyTorch from the same noise, with several batch sizes in ONNX Runtime.

    Class-conditional networks are checked for all classes and none, if they take guidance with and without it. The
    steps' noise in memory is that of a part of the images, MAX_NOISE bytes or a single image.

    Raises UserError if more than the fraction MAX_OFF_BY_ONE of the values differ, or one by more than a grey level.
    """
    facts = sampler.get_modelmeta().custom_metadata_map
    noise = 4 * int(facts["ddpm.steps"]) * math.prod(model.shape) if "steps_noise" in golden.names(sampler) else 0
    together = max(1, min(IMAGES, MAX_NOISE // max(noise, 1)))
    differing, values, largest = 0, 0, 0
    for first in range(0, IMAGES, together):
        for off in _differences(sampler, model, options, first, min(together, IMAGES - first)):
            differing, values = differing + int((off > 0).sum()), values + off.size
            largest = max(largest, int(off.max()))
    share = differing / values
    if largest > 1 or share > MAX_OFF_BY_ONE:
        raise UserError(
            f"sampler.onnx: {share:.2%} of its pixel values differ from PyTorch's, by up to "
            f"{counted(largest, 'grey level')} (allowed: {MAX_OFF_BY_ONE:.1%} and 1); no model was written: choose "
            "another export.sampler or fewer export.steps, for a student fewer distill.sampling_steps"
        )
    return {"images": IMAGES, "values_off_by_one": share}


def _differences(
    sampler: ort.InferenceSession, model: Model, options: SampleOptions, first: int, count: int
) -> Iterator[NDArray[np.int64]]:
    """Differences between ONNX Runtime and PyTorch for `count` images from number `first`: batches, in grey levels."""
    facts = sampler.get_modelmeta().custom_metadata_map
    given = golden.inputs(golden.names(sampler), facts, golden.SEED + first, count)
    if "y" in given:
        given["y"] = np.arange(first, first + count) % (model.num_classes + 1) - 1
    for guidance in (options.guidance, 2.0 if options.guidance == 1 else 1.0) if "guidance" in given else (1.0,):
        if "guidance" in given:
            given["guidance"] = np.array([guidance], np.float32)
        expected = _with_torch(model, options.model_copy(update={"guidance": guidance}), given).astype(int)
        for size in BATCH_SIZES:
            for start in range(0, min(count, MAX_BATCHES * size - first), size):
                images = sampler.run(["images"], _part(given, start, start + size))[0].astype(int)
                yield np.abs(images - expected[start : start + size])


def _with_torch(model: Model, options: SampleOptions, given: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """PyTorch's images for the same inputs, uint8 (B, H, W, C)."""

    def noise(place: int) -> torch.Tensor:
        return torch.from_numpy(given["noise"] if place == 0 else given["steps_noise"][place - 1])

    y = torch.from_numpy(given["y"]) if "y" in given else None
    timesteps = sampling.sampling_timesteps(options, model.process.schedule)
    return to_uint8(sample(model.sampler(options, y), noise, timesteps).numpy()).transpose(0, 2, 3, 1)


def _part(given: dict[str, NDArray[Any]], start: int, end: int) -> dict[str, NDArray[Any]]:
    """The inputs of images `start` to `end`."""
    part = {name: array[start:end] for name, array in given.items() if name in ("noise", "y")}
    part |= {name: given[name] for name in ("steps", "guidance") if name in given}
    return part | ({"steps_noise": given["steps_noise"][:, start:end]} if "steps_noise" in given else {})
