"""sampler.onnx on a GPU gives the same images as PyTorch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.model import Config, Model, new_network
from diffusion.process import build
from diffusion.sampling.build import SampleOptions, sampling_timesteps
from diffusion.sampling.sampler import sample
from flows.params import Params
from tests.gpu.conftest import REHEARSAL, SHAPE, randomized

if not (REHEARSAL or torch.cuda.is_available()):
    pytest.skip("needs a GPU", allow_module_level=True)
ort = pytest.importorskip("onnxruntime")
for name in ("onnx", "onnxscript"):
    pytest.importorskip(name)
if not REHEARSAL and "CUDAExecutionProvider" not in ort.get_available_providers():
    pytest.skip("this ONNX Runtime has no CUDAExecutionProvider", allow_module_level=True)


def test_its_pictures_are_those_of_torch(params: Params, device: torch.device) -> None:
    """Both in float32, from the same noise; the bound is for 10 steps, each a few hundred roundings deep."""
    from diffusion.export import denoiser, parity, sampler_graph

    torch.manual_seed(0)
    small = {"channel_multipliers": (1,), "attention_levels": (), "blocks_per_level": 1}  # soon exported
    network = params.network.model_copy(update=small)
    net = randomized(new_network(SHAPE, 0, network, params.process)).eval()
    config = Config(shape=SHAPE, classes=(), network=network, process=params.process, x_0_mse=None)
    model = Model(net, build.process(params.process), config)
    options = SampleOptions.model_validate(params.sample.model_dump() | {"sampler": "ddim", "steps": 10})
    graph = sampler_graph.to_onnx(denoiser.to_onnx(model, params.export.opset), model, options)
    session = parity.session(graph.SerializeToString(), device)
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    x_0 = session.run(["x_0"], {"noise": noise.numpy(), "steps": np.array([10])})[0]
    net.to(device)
    expected = sample(
        model.sampler(options), lambda _: noise.to(device), sampling_timesteps(options, model.process.schedule)
    )
    np.testing.assert_allclose(x_0, expected.cpu().numpy(), rtol=0, atol=1e-4)


def test_the_service_runs_it_on_the_gpu(tmp_path: Path) -> None:
    """With the state of the images in the memory of the GPU, where its loop reads it."""
    from deploy.service.models import Model
    from tests.deploy.models import write_model

    classes = not REHEARSAL  # whose network takes twice as long to export
    content = write_model(tmp_path / "sampler.onnx", "dpm-solver++", classes).read_bytes()
    model, expected = Model(content, device="cpu" if REHEARSAL else "cuda"), Model(content).sample(4)["images"]
    assert model.device == model._places["state"] == ("cpu" if REHEARSAL else "cuda")
    assert np.abs(model.sample(4)["images"].astype(int) - expected).max() <= 1
