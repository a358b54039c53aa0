"""Variants in reduced precision in ONNX Runtime, against the float32 models."""

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch

from diffusion.errors import UserError
from diffusion.export import denoiser, golden, metadata, parity, sampler_graph, speed, variants
from diffusion.model import Model
from diffusion.nn.layers import GroupNorm, TimeEmbedding
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import HeldOut, Pairs
from flows.stages.export import finished
from tests import sharing
from tests.export.test_sampler_graph import SHAPE, given, parts
from tests.nn.networks import NUM_CLASSES
from tests.process import fakes
from tests.rounding import assert_rounds_alike

pytestmark = pytest.mark.slow

NAMES = ("fp16", "int8")


class FewPairs:
    """In-memory pairs with two blocks, of which the second is short, and two draws."""

    blocks, images = 2, 2 * BLOCK - 23
    manifest = SimpleNamespace(heldout_draws=2)

    def __init__(self, model: Model) -> None:
        self.schedule = model.process.schedule

    def size(self, block: int) -> int:
        return BLOCK - 23 * block

    def labels(self, block: int) -> Any:
        return np.arange(self.size(block)) % (NUM_CLASSES + 1) - 1

    def heldout(self, block: int, draw: int) -> HeldOut:
        generator, n = np.random.default_rng([block, draw]), self.size(block)
        t = generator.permutation(np.linspace(0, 99, n).astype(np.int64))
        x_0, eps = np.tanh(generator.standard_normal((2, n, *SHAPE), np.float32))
        return HeldOut(t, self.schedule.diffuse(*map(torch.from_numpy, (x_0, t, eps))).numpy(), eps)


def pairs_of(model: Model) -> Pairs:
    return cast("Pairs", FewPairs(model))


def build(name: str, classes: bool) -> bytes:
    model, step = parts(classes)
    before = step.SerializeToString()
    made = variants.build(name, model, step, 20, pairs_of(model))
    assert step.SerializeToString() == before
    return made.SerializeToString(deterministic=True)


@cache
def graph(name: str, classes: bool = True) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(sharing.content(f"{name}-{classes}.onnx", lambda: build(name, classes)))


@pytest.mark.parametrize(("name", "share", "off"), [("fp16", 0.6, 3e-3), ("int8", 0.5, 0.08)])
def test_a_variant_is_smaller_and_nearly_the_same(name: str, share: float, off: float) -> None:
    model, step = parts(True)
    variant = graph(name)
    onnx.checker.check_model(variant, full_check=True)
    weights = [sum(len(weight.raw_data) for weight in each.graph.initializer) for each in (variant, step)]
    assert weights[0] < share * weights[1]
    for each in ("input", "output"):  # the same inputs and outputs
        assert getattr(variant.graph, each) == getattr(step.graph, each)
    held = FewPairs(model).heldout(1, 1)
    cpu = torch.device("cpu")
    outputs = []
    for each in (variant, step):
        loaded = parity.session(each.SerializeToString(), cpu)
        feed = {"x_t": held.x_t, "t": held.t, "y": FewPairs(model).labels(1)}
        outputs.append(loaded.run(["eps_hat", "x_0_hat"], {key: feed[key] for key in golden.names(loaded)}))
    for found, exact in zip(*outputs, strict=True):
        assert 0 < np.sqrt(np.square(found - exact).mean()) < off * exact.std()


@pytest.mark.parametrize("name", NAMES)
def test_equal_models_give_equal_bytes(name: str) -> None:
    assert graph(name).SerializeToString(deterministic=True) == build(name, True)


def in_8_bits(model: onnx.ModelProto) -> set[str]:
    """Names of the products with quantized weights."""
    restored = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return {node.name for node in model.graph.node if node.op_type in variants.PRODUCTS and node.input[1] in restored}


def test_products_within_attention_stay_in_float32() -> None:
    _, step = parts(True)
    weights = {weight.name for weight in step.graph.initializer}
    products = {node.name: node for node in step.graph.node if node.op_type in variants.PRODUCTS}
    within = {name for name, node in products.items() if not weights & {*node.input}}
    assert len(within) >= 2
    assert all(name.startswith("node_MatMul") or "attention" in name for name in within)
    assert in_8_bits(graph("int8")) == products.keys() - within


def test_layers_that_lose_much_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = parts(False)
    whole = in_8_bits(graph("int8", False))
    bad = [node.name for node in step.graph.node if node.op_type == "Conv"][1]

    def mse(denoiser: onnx.ModelProto, _: Pairs) -> float:
        quantized = in_8_bits(denoiser)
        assert len(quantized) <= 1  # each layer is tried alone
        return 0.5 * (1.0021 if bad in quantized else 1.0019 if quantized else 1)

    monkeypatch.setattr(variants, "_block_mse", mse)
    made = in_8_bits(variants.int8(step, pairs_of(model)))
    assert whole - made == {bad}
    assert made < whole


def test_if_all_layers_lose_too_much_none_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = parts(False)
    monkeypatch.setattr(variants, "_block_mse", lambda denoiser, _: 1.0 if in_8_bits(denoiser) else 0.5)
    assert variants.int8(step, pairs_of(model)) == step


def test_float16_keeps_the_sines_of_t_and_leaves_the_model_alone() -> None:
    model, _ = parts(False)
    half = variants.Half(model.net)
    whole = next(part for part in model.net.modules() if isinstance(part, TimeEmbedding))
    part = next(part for part in half.modules() if isinstance(part, TimeEmbedding))
    assert torch.equal(part.frequencies, whole.frequencies)
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}
    assert {weight.dtype for weight in model.net.parameters()} == {torch.float32}
    t = torch.arange(0, 1000, 37)
    assert (part(t).float() - whole(t)).abs().max() < 2e-3 * whole(t).abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", ["dpm-solver++", "ddpm"])
def test_the_sampler_around_a_variant_makes_nearly_the_same_pictures(name: str, sampler: str) -> None:
    model, step = parts(True)
    settings = fakes.options(sampler=sampler, threshold="clip", steps=4, guidance=2.5)
    images = []
    for each in (graph(name), step):
        loop = sampler_graph.to_onnx(each, model, settings)
        facts = metadata.of_model(model, "analytic", "weights", "data", {}) | metadata.of_sampler(settings, loop)
        whole = parity.session(finished("sampler.onnx", loop, facts), torch.device("cpu"))
        assert golden.check(whole, whole.get_modelmeta().custom_metadata_map).exact
        feed = given(5, 4)
        images.append(whole.run(["images"], {key: feed[key] for key in golden.names(whole)})[0].astype(int))
    assert 0 < np.abs(images[0] - images[1]).mean() < 16  # random weights, guidance 2.5


def test_a_variant_that_is_worse_than_allowed_is_refused() -> None:
    model, step = parts(True)
    cpu, pairs = torch.device("cpu"), pairs_of(model)
    whole = variants.check("fp32", parity.session(step.SerializeToString(), cpu), pairs, 1.0, 1e9)
    exact = parity.check_denoiser(parity.session(step.SerializeToString(), cpu), model, pairs, 1e-3)
    assert whole.mse == pytest.approx(exact["mse"], rel=1e-9)
    assert whole.loss == pytest.approx(whole.mse - 1)
    worse = parity.session(graph("int8").SerializeToString(), cpu)
    score = variants.check("int8", worse, pairs, whole.mse, 1.0)
    assert score.loss == pytest.approx(score.mse / whole.mse - 1)
    with pytest.raises(UserError, match=r"^export\.variants: int8 has a held-out MSE of .* no model was written$"):
        variants.check("int8", worse, pairs, whole.mse, score.loss - 1e-6)


def test_what_is_not_finite_is_refused() -> None:
    model, step = parts(False)
    broken = onnx.ModelProto.FromString(step.SerializeToString())
    weight = next(weight for weight in broken.graph.initializer if len(weight.dims) == 4)
    weight.raw_data = np.full(tuple(weight.dims), np.nan, np.float32).tobytes()
    session = parity.session(broken.SerializeToString(), torch.device("cpu"))
    with pytest.raises(UserError, match=r"int8 has a held-out MSE of nan"):
        variants.check("int8", session, pairs_of(model), 0.5, 1e9)


def test_the_speed_of_each_variant_is_measured() -> None:
    model, step = parts(True)
    settings = metadata.of_model(model, "analytic", "weights", "data", {})
    facts = settings | {"ddpm.steps": "4", "ddpm.guidance": "1.0"}
    loaded = parity.session(finished("denoiser.onnx", step, facts), torch.device("cpu"))
    found = speed.measure({"fp32": loaded, "int8": loaded})
    assert {name: set(times) for name, times in found.items()} == {name: {"ms_at_1", "ms_at_64"} for name in found}
    assert set(found) == {"fp32", "int8"}
    assert all(time > 0 for times in found.values() for time in times.values())


@pytest.mark.parametrize("film", [True, False])
def test_the_normalization_of_the_export_is_the_same(film: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(4, 12, eps=1e-6)
    x, scale, shift = (torch.randn(3, 12, *sides, generator=generator) for sides in ((5, 6), (), ()))
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
        given_too = (scale, shift) if film else ()
        expected = norm(x, *given_too), copy.deepcopy(norm).double()(x.double(), *given_too)
        assert_rounds_alike(denoiser.FastGroupNorm(norm)(x, *given_too), *expected)


def test_no_normalization_of_a_single_thread_is_left() -> None:
    kinds = {node.op_type for node in parts(True)[1].graph.node}
    assert "LayerNormalization" in kinds
    assert "InstanceNormalization" not in kinds
