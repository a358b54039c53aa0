"""Sampling speed."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from diffusion.model import Config, Model, new_network
from diffusion.nn.layers import Network
from diffusion.pairs.pixels import to_uint8
from diffusion.process import build
from diffusion.sampling.build import SampleOptions, sampling_timesteps
from diffusion.sampling.sampler import sample
from diffusion.training.hardware import tf32
from gpu_measurements import peer
from gpu_measurements.bench import SHAPES, Bench, Facts
from gpu_measurements.turns import Contender, Ready, slices

OPSET = 20


class Drawing:
    """The network of cifar10 with random weights, and backends to sample `size` images with it."""

    def __init__(self, bench: Bench, size: int) -> None:
        self.bench, self.size, self.params = bench, size, bench.params("cifar10")
        if bench.rehearse:  # soon exported
            smallest = {"channel_multipliers": (1,), "attention_levels": ()}
            network = self.params.network.model_copy(update=smallest)
            self.params = self.params.model_copy(update={"network": network})
        self.shape = SHAPES["cifar10"]
        self.net = self._network()
        self.compiled = self._network()
        self.compiled.compile(dynamic=False)
        self._session: Any = None
        self.noise = torch.randn(size, *self.shape)

    def _network(self) -> Network:
        torch.manual_seed(0)
        net = new_network(self.shape, 0, self.params.network, self.params.process)
        return net.to(self.bench.device).eval().requires_grad_(False)

    def model(self, net: Network) -> Model:
        params = self.params
        config = Config(shape=self.shape, classes=(), network=params.network, process=params.process, x_0_mse=None)
        return Model(net, build.process(params.process), config)

    def options(self, steps: int) -> SampleOptions:
        changes = {"sampler": "dpm-solver++", "steps": steps, "spacing": "quadratic"}
        return SampleOptions.model_validate(self.params.sample.model_dump() | changes)

    def by_torch(self, steps: int, use_tf32: bool, compiled: bool) -> Ready:
        """Sample with PyTorch, from noise to uint8 images, both in host memory."""
        model, options = self.model(self.compiled if compiled else self.net), self.options(steps)
        visited = sampling_timesteps(options, model.process.schedule)

        def draw() -> object:
            x_t = self.noise.to(self.bench.device).to(memory_format=torch.channels_last)
            with tf32() if use_tf32 and self.bench.cuda else nullcontext():
                return to_uint8(sample(model.sampler(options), lambda _: x_t, visited).cpu().numpy())

        return Ready(draw)

    def by_onnx(self, steps: int) -> Ready:
        """Sample with sampler.onnx on the same device."""
        import onnxruntime as ort

        from diffusion.export import denoiser, parity, runtime, sampler_graph

        if self.bench.cuda and runtime.CUDA not in ort.get_available_providers():
            raise ModuleNotFoundError(f"ONNX Runtime has no {runtime.CUDA}", name="onnxruntime-gpu")
        model = self.model(self.net)
        if self._session is None:  # it supports any number of steps
            graph = sampler_graph.to_onnx(denoiser.to_onnx(model, OPSET), model, self.options(steps))
            self._session = parity.session(graph.SerializeToString(), self.bench.device)
        feed = {"noise": self.noise.numpy(), "steps": np.array([steps])}
        return Ready(partial(self._session.run, ["images"], feed))

    def by_diffusers(self, steps: int) -> Ready:
        return Ready(peer.pipeline(self.bench, self.size, steps))


def sampling(bench: Bench) -> Iterator[Facts]:
    """Sampling with the network of cifar10 and dpm-solver++, and with diffusers' DDIMPipeline and as many steps."""
    size = 2 if bench.rehearse else 256
    drawing = Drawing(bench, size)
    backends: list[tuple[str, str, Callable[[int], Ready]]] = [
        ("torch, compiled", "tf32", partial(drawing.by_torch, use_tf32=True, compiled=True)),
        ("torch", "tf32", partial(drawing.by_torch, use_tf32=True, compiled=False)),
        ("diffusers", "tf32", drawing.by_diffusers),
        ("torch", "fp32", partial(drawing.by_torch, use_tf32=False, compiled=False)),
        ("ONNX Runtime", "fp32", drawing.by_onnx),
    ]
    contenders = [
        Contender({"by": by, "precision": precision, "steps": steps, "batch_size": size}, size, partial(make, steps))
        for steps in ((2, 3) if bench.rehearse else (10, 50))
        for by, precision, make in backends
    ]
    yield from slices(bench, contenders, rounds=3, seconds=0.5)
