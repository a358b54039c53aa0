"""Variants of the denoiser in reduced precision: float16, or int8 for convolutions and matrix products.

The sampler around a variant is built like the one around the denoiser itself, and stays in float32.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.export import golden, runtime
from diffusion.export.denoiser import to_onnx
from diffusion.model import Model
from diffusion.nn.layers import TimeEmbedding
from diffusion.pairs.pairs import Pairs
from diffusion.storage.files import writing

PRODUCTS = ("Conv", "Gemm", "MatMul")
CALIBRATION_BATCHES, CALIBRATION_BATCH = 32, 16
"""Number and size of the calibration batches; the activations of one batch are in memory at a time."""
PERCENTILE = 99.999
"""Activations are clipped at this percentile and its counterpart at the lower end."""
MAX_LAYER_LOSS = 0.002
"""Largest relative increase of the MSE by a single layer in 8 bits."""


class Score(NamedTuple):
    """A variant's score on held-out pairs."""

    mse: float
    loss: float
    """Relative increase of the MSE over that of the float32 denoiser."""


class Half(nn.Module):
    """A network in float16 with float32 inputs and outputs; the sinusoidal features of t are computed in float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).half()
        for whole, part in zip(net.modules(), self.net.modules(), strict=True):
            if isinstance(whole, TimeEmbedding) and isinstance(part, TimeEmbedding):
                part.frequencies = whole.frequencies

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(x_t.half(), t, y).float()


def build(name: str, model: Model, denoiser: ModelProto, opset: int, pairs: Pairs) -> ModelProto:
    """Build a variant of a model's `denoiser`, by its name in `export.variants`; int8 is calibrated on val `pairs`."""
    if name == "fp16":
        return to_onnx(replace(model, net=Half(model.net)), opset)
    return int8(denoiser, pairs)


def require_calibration(names: Iterable[str], pairs: Pairs) -> None:
    """Raise UserError if a variant in `names` is calibrated and there are no val `pairs` to do it with."""
    if "int8" in names and not pairs.blocks:
        raise UserError(
            "export.variants: int8 is calibrated on val pairs, and data/pairs has none; remove int8, or increase "
            "shard.val_fraction and run `ddpm shard` and `ddpm pairs` again"
        )


def int8(denoiser: ModelProto, pairs: Pairs) -> ModelProto:
    """Static quantization of convolutions and matrix products to 8 bits (Jacob et al. 2018), calibrated on val pairs.

    Only products with weights are quantized, not those within attention, which were no faster. A layer whose
    quantization alone increases the MSE of a block of val pairs by more than MAX_LAYER_LOSS stays in float32: its
    inputs have outliers.
    """
    weights = {weight.name for weight in denoiser.graph.initializer}
    products = (node for node in denoiser.graph.node if node.op_type in PRODUCTS)
    layers = [node.name for node in products if weights & {*node.input}]
    calibration, allowed = _Calibration(denoiser, pairs), (1 + MAX_LAYER_LOSS) * _block_mse(denoiser, pairs)
    with writing(Path(gettempdir())), TemporaryDirectory() as temporary, _quiet():
        whole = Path(temporary) / "denoiser.onnx"
        onnx.save_model(denoiser, whole)  # quantize_static would modify a graph in memory
        alone = {layer: _block_mse(_quantized(whole, calibration, [layer]), pairs) for layer in layers}
        return _quantized(whole, calibration, [layer for layer in layers if alone[layer] <= allowed])


def _quantized(whole: Path, calibration: "_Calibration", layers: list[str]) -> ModelProto:
    """The graph in the file `whole` with these layers in 8 bits; the ranges are measured once, and kept beside it."""
    from onnxruntime import quantization

    if not layers:  # quantize_static would take this to mean all
        return onnx.load(whole)
    file = whole.with_name("int8.onnx")
    quantization.quantize_static(
        whole,
        file,
        calibration,
        op_types_to_quantize=list(PRODUCTS),
        nodes_to_quantize=layers,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.Percentile,
        calibration_cache_path=whole.with_name("ranges.json"),
        extra_options={
            "CalibPercentile": PERCENTILE,
            "CalibTensorRangeSymmetric": False,
            "CalibStridedMinMax": 1,  # one batch at a time
        },
    )
    return onnx.load(file)


def _block_mse(denoiser: ModelProto, pairs: Pairs) -> float:
    """MSE of eps_hat on the first block, whose timesteps are spread evenly."""
    session = runtime.session(denoiser.SerializeToString(), None)
    feed, eps = next(_batches(pairs, golden.names(session)))
    return float(np.square(session.run(["eps_hat"], feed)[0] - eps, dtype=np.float64).mean())


def check(name: str, session: ort.InferenceSession, pairs: Pairs, mse: float, max_loss: float) -> Score:
    """Score a variant on all held-out pairs; raises UserError if its MSE exceeds `mse` by more than the fraction
    `max_loss`.
    """
    inputs, total, count = golden.names(session), 0.0, 0
    for feed, eps in _batches(pairs, inputs):
        total += float(np.square(session.run(["eps_hat"], feed)[0] - eps, dtype=np.float64).sum())
        count += eps.size
    score = Score(total / count, total / count / mse - 1)
    if not score.loss <= max_loss:
        raise UserError(
            f"export.variants: {name} has a held-out MSE of {score.mse:.6f} instead of {mse:.6f}, an increase of "
            f"{score.loss:.2%} (export.max_loss is {max_loss:.2%}); remove {name} or increase export.max_loss; no "
            "model was written"
        )
    return score


def _batches(
    pairs: Pairs, inputs: list[str], size: int | None = None
) -> Iterator[tuple[dict[str, NDArray[Any]], NDArray[np.float32]]]:
    """A denoiser's inputs and the true noise, in batches of `size`, or of a block each."""
    for draw in range(pairs.manifest.heldout_draws):
        for block in range(pairs.blocks):
            given = {**pairs.heldout(block, draw)._asdict(), "y": pairs.labels(block)}
            for start in range(0, pairs.size(block), size or pairs.size(block)):
                part = {name: array[start:][:size] for name, array in given.items()}
                yield {name: part[name] for name in inputs}, part["eps"]


class _Calibration:
    """Pairs as a CalibrationDataReader for ONNX Runtime."""

    def __init__(self, denoiser: ModelProto, pairs: Pairs) -> None:
        inputs = [value.name for value in denoiser.graph.input]
        batches = islice(_batches(pairs, inputs, CALIBRATION_BATCH), CALIBRATION_BATCHES)
        self.feeds = [feed for feed, _ in batches]
        self.set_range(0, len(self.feeds))

    def __len__(self) -> int:
        return len(self.feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.feeds[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self.left, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence ONNX Runtime's quantization, which prints its progress and logs inapplicable advice."""
    before, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers  # `logging.warning` adds one, disabled or not
