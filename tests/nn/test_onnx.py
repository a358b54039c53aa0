"""Every network as an ONNX graph with a dynamic batch size."""

import copy

import onnxruntime
import pytest
import torch

from diffusion.export.denoiser import Step, to_onnx
from diffusion.model import Config, Model
from diffusion.process import build
from diffusion.process.build import ProcessOptions
from tests.nn.networks import NUM_CLASSES, network, noise, options, randomize
from tests.process.fakes import PROCESS
from tests.rounding import assert_rounds_alike

pytestmark = pytest.mark.slow

SHAPE = (3, 7, 10)
CASES = [("unet", "add", False), ("unet", "film", True), ("uvit", "token", True), ("uvit", "adaln", True)]
SMALL = {"film": {"channel_multipliers": [1], "attention_levels": [0]}}
"""Two levels with film are in export/test_sampler_graph.py."""


@pytest.mark.parametrize(("kind", "conditioning", "classes"), CASES)
def test_onnx_runtime_agrees_with_torch_at_any_batch_size(kind: str, conditioning: str, classes: bool) -> None:
    changes = {"classes": classes, "patch_size": 2} | SMALL.get(conditioning, {})
    net = randomize(network(SHAPE, kind, conditioning, learned_variance=classes, **changes))
    process = ProcessOptions.model_validate(PROCESS | {"parameterization": "v", "learned_variance": classes})
    config = Config(
        shape=SHAPE,
        classes=tuple(map(str, range(NUM_CLASSES))),
        network=options(kind, conditioning, **changes),
        process=process,
        x_0_mse=None,
    )
    model = Model(net, build.process(process), config)

    def inputs(size: int) -> dict[str, torch.Tensor]:
        t, y = torch.arange(size) * 99, torch.arange(size) % 4 - 1
        return {"x_t": noise(size, *SHAPE), "t": t} | ({"y": y} if classes else {})

    content = to_onnx(model, opset=20).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert {node.name: node.shape[0] for node in session.get_inputs()} == dict.fromkeys(inputs(2), "B")
    step = Step(net, model.process.parameterization)
    exact = Step(copy.deepcopy(net).double(), model.process.parameterization)
    for size in (1, 3, 7):
        found = session.run(["eps_hat", "x_0_hat"], {name: value.numpy() for name, value in inputs(size).items()})
        with torch.no_grad():
            float32 = step(**inputs(size))
            float64 = exact(**inputs(size) | {"x_t": inputs(size)["x_t"].double()})
        for output, *expected in zip(found, float32, float64, strict=True):
            assert_rounds_alike(torch.from_numpy(output), *expected)
