"""Small model files."""

from functools import cache
from pathlib import Path

from diffusion.export import metadata, sampler_graph
from flows.stages.export import finished
from tests import sharing
from tests.export.test_sampler_graph import parts
from tests.process import fakes


def write_model(path: Path, sampler: str, classes: bool, steps: int = 4) -> Path:
    """Write a complete sampler.onnx with random weights."""
    path.write_bytes(content(sampler, classes, steps))
    return path


@cache
def content(sampler: str, classes: bool, steps: int) -> bytes:
    """The bytes of such a file."""
    name = f"{sampler}-{classes}-{steps}-sampler.onnx"
    return sharing.content(name, lambda: _made(sampler, classes, steps))


def _made(sampler: str, classes: bool, steps: int) -> bytes:
    model, step = parts(classes)
    settings = fakes.options(**fakes.guided({"sampler": sampler}), threshold="clip", steps=steps)
    loop = sampler_graph.to_onnx(step, model, settings)
    facts = metadata.of_model(model, "analytic", "a" * 64, "data", {"mse": 0.5})
    return finished("sampler.onnx", loop, facts | metadata.of_sampler(settings, loop))
