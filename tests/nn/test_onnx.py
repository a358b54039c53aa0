"""Every network as an ONNX graph with a free batch size."""

import logging
import warnings

import onnxruntime
import pytest
import torch
from torch import nn

from tests.nn.networks import network, noise, randomize

CASES = [("unet", "add", False), ("unet", "film", True), ("uvit", "token", True), ("uvit", "adaln", True)]


def exported(net: nn.Module, inputs: dict[str, torch.Tensor]) -> onnxruntime.InferenceSession:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    batch = torch.export.Dim("B")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["out"],
            dynamic_shapes={name: {0: batch} for name in inputs},
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("kind", "conditioning", "classes"), CASES)
def test_onnx_runtime_agrees_with_torch_at_any_batch_size(kind: str, conditioning: str, classes: bool) -> None:
    net = randomize(network((3, 7, 10), kind, conditioning, classes=classes, learned_variance=classes, patch_size=2))

    def inputs(size: int) -> dict[str, torch.Tensor]:
        t, y = torch.arange(size) * 99, torch.arange(size) % 4 - 1
        return {"x_t": noise(size, 3, 7, 10), "t": t} | ({"y": y} if classes else {})

    session = exported(net, inputs(2))
    assert {node.name: node.shape[0] for node in session.get_inputs()} == dict.fromkeys(inputs(2), "B")
    for size in (1, 3, 7):
        (out,) = session.run(["out"], {name: tensor.numpy() for name, tensor in inputs(size).items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(out), net(*inputs(size).values()), atol=1e-5, rtol=1e-4)
