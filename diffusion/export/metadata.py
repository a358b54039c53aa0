"""Metadata for consumers of the ONNX files; deploy/ONNX.md documents each key."""

import hashlib
import json
from typing import Any

import onnx

from diffusion.export.runtime import MAX_FREE_STEPS
from diffusion.model import Model
from diffusion.sampling.build import SampleOptions

VERSION = 2
"""Version of the keys, incremented when one changes its meaning or is removed."""


def of_model(
    model: Model, variance: str, weights_sha256: str, data_sha256: str, scores: dict[str, Any]
) -> dict[str, str]:
    """Keys of both graphs: the model's origin, the meaning of its values, and its scores."""
    process = model.config.process
    alpha_bar = model.process.schedule.alpha_bar.numpy().astype("<f8")
    channels, height, width = model.shape
    facts = {
        "version": VERSION,
        "channels": channels,
        "height": height,
        "width": width,
        "classes": json.dumps(model.config.classes if model.num_classes else []),
        "parameterization": process.parameterization,
        "schedule": process.schedule.kind,
        "num_timesteps": process.num_timesteps,
        "timesteps": "t is 0-based: x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) eps",
        "alpha_bar": json.dumps(alpha_bar.tolist()),
        "alpha_bar_sha256": hashlib.sha256(alpha_bar.tobytes()).hexdigest(),
        "value_range": "x_0 in [-1, 1]; uint8 = round((x_0 + 1) * 127.5), clipped before, halves to even",
        "weights_sha256": weights_sha256,
        "data_sha256": data_sha256,
        "variance": variance,
        "heldout": json.dumps(scores),
    }
    return _named(facts)


def of_sampler(options: SampleOptions, graph: onnx.ModelProto) -> dict[str, str]:
    """Additional keys of sampler.onnx."""
    stochastic = "steps_noise" in {value.name for value in graph.graph.input}
    facts: dict[str, Any] = {
        "sampler": options.sampler.kind,
        "steps": options.steps,
        "max_free_steps": MAX_FREE_STEPS,
        "spacing": options.spacing,
        "threshold": options.threshold,
        "guidance": options.guidance,
        "stochastic": str(stochastic).lower(),
    }
    facts |= {name: value for name, value in options.sampler if name != "kind"}
    return _named(facts)


def describe(graph: onnx.ModelProto, facts: dict[str, str]) -> None:
    """Replace the graph's `metadata_props` by `facts`."""
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, facts)


def _named(facts: dict[str, Any]) -> dict[str, str]:
    return {f"ddpm.{name}": str(value) for name, value in facts.items()}
