"""The complete sampling loop in ONNX Runtime, against the samplers in PyTorch."""

import copy
import dataclasses
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from diffusion.export import denoiser, metadata, parity, sampler_graph
from diffusion.model import Config, Model
from diffusion.pairs.pixels import to_uint8
from diffusion.process import build
from diffusion.process.build import ProcessOptions
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import sample
from tests import sharing
from tests.nn.networks import NUM_CLASSES, network, options, randomize
from tests.process import fakes
from tests.rounding import assert_rounds_alike

pytestmark = pytest.mark.slow

SHAPE = (3, 7, 10)
PROCESS = fakes.PROCESS | {"parameterization": "v", "num_timesteps": 100}
X_0_MSE = tuple(fakes.gaussian_x_0_mse(fakes.process(num_timesteps=100).schedule, 0.5).tolist())


@cache
def parts(classes: bool) -> tuple[Model, onnx.ModelProto]:
    """A model with random weights, and its denoiser."""
    levels = {"channel_multipliers": [1, 2], "attention_levels": [1]} if classes else {"channel_multipliers": [1]}
    changes = {"classes": classes, "attention_levels": [0]} | levels
    net = randomize(network(SHAPE, "unet", "film", **changes))
    process = ProcessOptions.model_validate(PROCESS)
    config = Config(
        shape=SHAPE,
        classes=tuple(map(str, range(NUM_CLASSES))),
        network=options("unet", "film", **changes),
        process=process,
        x_0_mse=X_0_MSE,
    )
    model = Model(net, build.process(process), config)
    content = sharing.content(
        f"denoiser-{classes}.onnx", lambda: denoiser.to_onnx(model, opset=20).SerializeToString(deterministic=True)
    )
    return model, onnx.ModelProto.FromString(content)


def session(graph: onnx.ModelProto) -> ort.InferenceSession:
    onnx.checker.check_model(graph, full_check=True)
    return ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def given(count: int, steps: int, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        "noise": generator.standard_normal((count, *SHAPE), np.float32),
        "steps_noise": generator.standard_normal((steps, count, *SHAPE), np.float32),
        "steps": np.array([steps]),
        "y": np.arange(count) % (NUM_CLASSES + 1) - 1,
        "guidance": np.array([2.5], np.float32),
    }


def pictures(model: Model, settings: SampleOptions, inputs: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    def noise(place: int) -> torch.Tensor:
        return torch.from_numpy(inputs["noise"] if place == 0 else inputs["steps_noise"][place - 1]).to(dtype)

    model = dataclasses.replace(model, net=copy.deepcopy(model.net).to(dtype))
    timesteps = sampling.sampling_timesteps(settings, model.process.schedule)
    return sample(model.sampler(settings, torch.from_numpy(inputs["y"])), noise, timesteps)


def same(found: list[Any], model: Model, settings: SampleOptions, inputs: dict[str, Any]) -> None:
    images, x_0 = found
    expected, exact = (pictures(model, settings, inputs, dtype) for dtype in (torch.float32, torch.float64))
    assert_rounds_alike(torch.from_numpy(x_0), expected, exact)
    off = np.abs(images.astype(int) - to_uint8(expected.numpy()).transpose(0, 2, 3, 1))
    assert images.dtype == np.uint8
    assert off.max() <= 1
    assert (off > 0).sum() <= 1 + parity.MAX_OFF_BY_ONE * off.size


@pytest.mark.parametrize("changes", fakes.SAMPLERS, ids=lambda changes: "-".join(map(str, changes.values())))
@pytest.mark.parametrize("classes", [False, True])
def test_the_graph_makes_the_pictures_of_the_sampler(changes: dict[str, object], classes: bool) -> None:
    model, step = parts(classes)
    settings = fakes.options(**fakes.guided(changes), steps=5, threshold="clip", spacing="quadratic")
    graph = sampler_graph.to_onnx(step, model, settings)
    found = session(graph)
    names = [value.name for value in found.get_inputs()]
    stochastic = changes["sampler"] in ("ddpm", "dpm-solver++-sde") or isinstance(changes["sampler"], dict)
    conditions = (["y", "guidance"] if settings.guidable else ["y"]) if classes else []
    assert names == ["noise", "steps_noise" if stochastic else "steps", *conditions]
    for count in (1, 4):
        inputs = given(count, 5)
        same(found.run(None, {name: inputs[name] for name in names}), model, settings, inputs)


@pytest.mark.parametrize("threshold", ["none", "clip", "dynamic"])
def test_thresholds(threshold: str) -> None:
    model, step = parts(False)
    settings = fakes.options(sampler="ddim", steps=3, threshold=threshold)
    inputs = given(3, 3)
    found = session(sampler_graph.to_onnx(step, model, settings)).run(
        None, {name: inputs[name] for name in ("noise", "steps")}
    )
    same(found, model, settings, inputs)


def test_another_number_of_steps_can_be_asked_for() -> None:
    model, step = parts(False)
    settings = fakes.options(sampler="heun", steps=60, threshold="clip")
    found, inputs = session(sampler_graph.to_onnx(step, model, settings)), given(2, 3)
    for steps in (0, 1, 9, sampler_graph.MAX_FREE_STEPS, 60):
        asked = {"noise": inputs["noise"], "steps": np.array([steps])}
        same(found.run(None, asked), model, settings.model_copy(update={"steps": steps or 60}), inputs)
    for steps in (-(2**63), -70, -61, -50, -1, 51, 55, 59, 61, 62, 2**63 - 1):
        with pytest.raises(Exception, match="steps must be 1 to 50, or 60, or 0"):
            found.run(None, {"noise": inputs["noise"], "steps": np.array([steps])})


def test_a_stochastic_sampler_takes_a_step_for_each_noise() -> None:
    model, step = parts(False)
    settings = fakes.options(sampler="ddpm", steps=5, threshold="clip")
    found, inputs = session(sampler_graph.to_onnx(step, model, settings)), given(2, 8)
    asked = {name: inputs[name] for name in ("noise", "steps_noise")}
    same(found.run(None, asked), model, settings.model_copy(update={"steps": 8}), inputs)
    for steps in (51, 60):
        with pytest.raises(Exception, match="steps_noise must be for 1 to 50 steps"):
            found.run(None, asked | {"steps_noise": np.zeros((steps, 2, *SHAPE), np.float32)})


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
def test_guidance_can_be_given(guidance: float) -> None:
    model, step = parts(True)
    settings = fakes.options(sampler="dpm-solver++", steps=4, threshold="clip", guidance=1.5)
    found, inputs = session(sampler_graph.to_onnx(step, model, settings)), given(4, 4)
    asked = {name: inputs[name] for name in ("noise", "steps", "y")} | {"guidance": np.array([guidance], np.float32)}
    same(found.run(None, asked), model, settings.model_copy(update={"guidance": guidance}), inputs)


def test_the_weights_are_in_the_loop_and_nowhere_else() -> None:
    """Outside of it ONNX Runtime does not pre-pack them, and each network evaluation takes nearly twice as long."""
    model, step = parts(False)
    graph = sampler_graph.to_onnx(step, model, fakes.options(sampler="ddim", threshold="clip")).graph
    (loop,) = [node for node in graph.node if node.op_type == "Loop"]
    weights = {value.name for value in loop.attribute[0].g.initializer}
    assert len(weights) == len(loop.attribute[0].g.initializer) > 20
    assert all(len(value.dims) < 4 for value in graph.initializer)


def test_the_same_bytes_twice() -> None:
    """Those of the denoiser: test_variants.py."""
    model, step = parts(False)
    settings = fakes.options(sampler="ddim", threshold="clip")
    first, second = (
        sampler_graph.to_onnx(step, model, settings).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("sampler", "fields"),
    [
        ("ddim", {"eta": "0.0"}),
        ({"kind": "consistency", "gamma": 0.6}, {"gamma": "0.6"}),
        ("consistency", {"gamma": "0.0"}),
        ("heun", {}),
    ],
)
def test_the_metadata_have_the_fields_of_the_sampler(sampler: Any, fields: dict[str, str]) -> None:
    model, step = parts(False)
    settings = fakes.options(sampler=sampler, steps=2, spacing="angle")
    facts = metadata.of_sampler(settings, sampler_graph.to_onnx(step, model, settings))
    assert facts["ddpm.sampler"] == settings.sampler.kind
    assert facts["ddpm.spacing"] == "angle"
    assert facts["ddpm.stochastic"] == str(isinstance(sampler, dict)).lower()
    assert {name: facts.get(f"ddpm.{name}") for name in ("eta", "gamma")} == {"eta": None, "gamma": None} | fields


def test_a_distilled_model_takes_the_steps_of_its_angles() -> None:
    model, step = parts(False)
    settings = fakes.options(sampler="consistency", steps=2, threshold="clip", spacing="angle")
    found, inputs = session(sampler_graph.to_onnx(step, model, settings)), given(2, 3)
    for steps in (0, 1, 2, 4):
        asked = {"noise": inputs["noise"], "steps": np.array([steps])}
        same(found.run(None, asked), model, settings.model_copy(update={"steps": steps or 2}), inputs)
