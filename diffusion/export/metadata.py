"""What a consumer of the ONNX file must know, written into it."""

import json

import onnx

from diffusion.model import Model


def describe(graph: onnx.ModelProto, model: Model, weights_sha256: str) -> None:
    """Put the process, the value range and the weights' digest into the file's `metadata_props`, as text."""
    schedule = model.process.schedule
    channels, height, width = model.shape
    facts = {
        "ddpm.version": "1",
        "ddpm.channels": channels,
        "ddpm.height": height,
        "ddpm.width": width,
        "ddpm.classes": json.dumps(model.config.classes if model.num_classes else []),
        "ddpm.output": "eps_hat, x_0_hat (not clipped)",
        "ddpm.schedule": model.config.process.schedule,
        "ddpm.num_timesteps": schedule.num_timesteps,
        "ddpm.alpha_bar": json.dumps(schedule.alpha_bar.tolist()),
        "ddpm.timesteps": "t is 0-based: x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) eps",
        "ddpm.value_range": "x_0 in [-1, 1]; uint8 = round((x_0 + 1) * 127.5)",
        "ddpm.weights_sha256": weights_sha256,
    }
    onnx.helper.set_model_props(graph, {name: str(value) for name, value in facts.items()})
