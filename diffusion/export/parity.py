"""Whether ONNX Runtime computes what torch computes."""

from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from diffusion import params
from diffusion.data.pairs import Pairs
from diffusion.errors import UserError
from diffusion.evaluation.heldout import predictions
from diffusion.evaluation.samples import to_uint8
from diffusion.export import golden
from diffusion.model import Model
from diffusion.process import build
from diffusion.process.sampler import sample
from diffusion.progress import Progress

BATCH_SIZES = (1, 7, 64)
SMALL = 4
"""Blocks of pairs that are run in every batch size; the rest in whole blocks."""
BANDS = 10
"""Of timesteps: each is compared by itself."""
PICTURES = 64
OFF_BY_ONE = 1e-3
"""Share of the pictures' values that may differ, by one grey level of 255."""


def session(content: bytes, device: torch.device) -> ort.InferenceSession:
    """An ONNX Runtime session for a model's bytes, on the GPU where `device` is one."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    gpu = ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0})
    providers = [gpu] if device.type == "cuda" else []
    return ort.InferenceSession(content, options, providers=[*providers, "CPUExecutionProvider"])


def check_denoiser(
    denoiser: ort.InferenceSession, model: Model, pairs: Pairs, tolerance: float
) -> dict[str, float | int | list[float]]:
    """Run all pairs of a held-out split through both; torch computes on the CPU, where `model` is.

    Gives the differences of eps_hat, by tenths of [0, T) as well, and the held-out MSE that ONNX Runtime comes to.
    Raises UserError if a value of eps_hat differs by more than `tolerance`, or the MSE by that share of it.
    """
    inputs = [value.name for value in denoiser.get_inputs()]  # x_t, t and, with classes, y
    T = model.process.schedule.num_timesteps
    by_band, total, values, count = np.zeros(BANDS), 0.0, 0, 0
    errors = {"onnx": 0.0, "torch": 0.0}
    with Progress("export", pairs.images * pairs.manifest.heldout_draws, "pairs") as progress:
        for number, prediction in enumerate(predictions(model, pairs, torch.device("cpu"))):
            size_of_block = len(prediction.t)
            for size in BATCH_SIZES if number < SMALL else BATCH_SIZES[-1:]:
                outputs = [
                    denoiser.run(
                        ["eps_hat"], {name: getattr(prediction, name)[start : start + size] for name in inputs}
                    )[0]
                    for start in range(0, size_of_block, size)
                ]
                eps_hat: NDArray[np.float64] = np.concatenate(outputs).astype(np.float64)
                difference = np.abs(eps_hat - prediction.eps_hat)
                np.maximum.at(by_band, prediction.t * BANDS // T, difference.max(axis=(1, 2, 3)))
                total, values = total + float(difference.sum()), values + difference.size
            for name, found in (("onnx", eps_hat), ("torch", prediction.eps_hat)):
                errors[name] += float(np.square(found - prediction.eps, dtype=np.float64).sum())
            count += size_of_block
            progress.advance(size_of_block)
    mse = {name: error / (count * prediction.eps[0].size) for name, error in errors.items()}
    largest = float(by_band.max())
    if not largest <= tolerance:
        band = int(by_band.argmax())
        raise UserError(
            f"denoiser.onnx: ONNX Runtime differs from torch by up to {largest:.2e} at t in [{band * T // BANDS}, "
            f"{(band + 1) * T // BANDS}), more than export.tolerance ({tolerance:g}) in params.yaml; "
            "no model was written"
        )
    if not abs(mse["onnx"] - mse["torch"]) <= tolerance * mse["torch"]:
        raise UserError(
            f"denoiser.onnx: the held-out MSE is {mse['onnx']:.6f} in ONNX Runtime and {mse['torch']:.6f} in torch, "
            f"more apart than export.tolerance ({tolerance:g}) in params.yaml allows; no model was written"
        )
    return {
        "max_difference": largest,
        "max_difference_by_band": by_band.tolist(),
        "mean_difference": total / values,
        "pairs": count,
        "mse": mse["onnx"],
    }


def check_sampler(sampler: ort.InferenceSession, model: Model, options: params.Sample) -> dict[str, float | int]:
    """Make pictures with both from the same noise, in ONNX Runtime in batches of several sizes.

    Raises UserError if more than OFF_BY_ONE of their values differ, or one by more than a grey level.
    """
    C, H, W = model.shape
    names = {value.name for value in sampler.get_inputs()}
    given: dict[str, NDArray[Any]] = {"noise": golden.normal(golden.SEED, 0, (PICTURES, C, H, W))}
    if "steps_noise" in names:
        given["steps_noise"] = golden.normal(golden.SEED, 1, (options.steps, PICTURES, C, H, W))
    if "steps" in names:
        given["steps"] = np.array([options.steps])
    if "y" in names:
        given["guidance"] = np.array([options.guidance], np.float32)
        given["y"] = np.arange(PICTURES) % model.num_classes

    def noise(place: int) -> torch.Tensor:
        return torch.from_numpy(given["noise"] if place == 0 else given["steps_noise"][place - 1])

    def part(name: str, array: NDArray[Any], start: int, end: int) -> NDArray[Any]:
        if name in ("steps", "guidance"):
            return array
        return array[:, start:end] if name == "steps_noise" else array[start:end]

    y = torch.from_numpy(given["y"]) if "y" in names else None
    timesteps = build.sampling_timesteps(options, model.process.schedule)
    expected = to_uint8(sample(model.sampler(options, y), noise, timesteps).numpy()).transpose(0, 2, 3, 1).astype(int)
    differing, largest = 0.0, 0
    for size in BATCH_SIZES:
        made = [
            sampler.run(
                ["images"],
                {name: part(name, array, start, start + size) for name, array in given.items()},
            )[0]
            for start in range(0, PICTURES if size > 1 else 4, size)
        ]
        images = np.concatenate(made).astype(int)
        off = np.abs(images - expected[: len(images)])
        differing, largest = max(differing, float((off > 0).mean())), max(largest, int(off.max()))
    if largest > 1 or differing > OFF_BY_ONE:
        raise UserError(
            f"sampler.onnx: of its pictures {differing:.2%} of the values differ from torch's, by up to {largest} grey "
            f"levels ({OFF_BY_ONE:.1%} and 1 are allowed); no model was written"
        )
    return {"images": PICTURES, "values_off_by_one": differing}
