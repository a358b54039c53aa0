"""Whether ONNX Runtime computes what torch computes."""

from itertools import islice
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import torch

from diffusion.data.pairs import Pairs
from diffusion.evaluation.heldout import predictions
from diffusion.model import Model

BATCH_SIZES = (1, 7, 64)
BLOCKS = 4


class Parity(NamedTuple):
    """Absolute differences of eps_hat between ONNX Runtime and torch."""

    max_difference: float
    mean_difference: float
    pairs: int


def session(content: bytes, device: torch.device) -> ort.InferenceSession:
    """An ONNX Runtime session for a model's bytes, on the GPU where `device` is one."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    gpu = ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0})
    providers = [gpu] if device.type == "cuda" else []
    return ort.InferenceSession(content, options, providers=[*providers, "CPUExecutionProvider"])


def compare(content: bytes, model: Model, pairs: Pairs, device: torch.device) -> Parity:
    """Run the first blocks of a held-out split, whose timesteps cover [0, T) evenly, in batches of several sizes.

    torch computes on the CPU, where `model` is, ONNX Runtime on `device`.
    """
    onnx_session = session(content, device)
    inputs = [value.name for value in onnx_session.get_inputs()]  # x_t, t and, with classes, y
    largest, total, values, count = 0.0, 0.0, 0, 0
    for prediction in islice(predictions(model, pairs, torch.device("cpu")), BLOCKS):
        count += len(prediction.t)
        for size in BATCH_SIZES:
            outputs = [
                onnx_session.run(
                    ["eps_hat"], {name: getattr(prediction, name)[start : start + size] for name in inputs}
                )[0]
                for start in range(0, len(prediction.t), size)
            ]
            difference = np.abs(np.concatenate(outputs).astype(np.float64) - prediction.eps_hat)
            largest = max(largest, float(difference.max()))
            total, values = total + float(difference.sum()), values + difference.size
    return Parity(largest, total / values, count)
