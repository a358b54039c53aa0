"""Fixtures for tests on a GPU. They do not need the pipeline, so they run on a machine with little more than PyTorch:

python -m pytest -W default --confcutdir tests/gpu tests/gpu
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.model import new_network
from diffusion.nn import build as networks
from diffusion.nn.layers import Network
from diffusion.pairs.pairs import Batch
from diffusion.process import build
from diffusion.training import loop
from diffusion.training.distributed import World
from diffusion.training.hardware import prefetched, runnable
from diffusion.training.state import State, new_state
from flows import presets
from flows.params import Params

REHEARSAL = os.environ.get("REHEARSE_GPU_TESTS") == "1"
"""Whether to run on the CPU, to test the tests."""
SHAPE = (1, 8, 8)
BATCH = 8 if REHEARSAL else 32
Start = Callable[..., tuple[State, loop.Trainer]]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU in a rehearsal."""
    return networks.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture
def params() -> Params:
    """Parameters of the preset digits, with a small network."""
    found = presets.load(Path(__file__).parents[2] / "presets" / "digits.yaml")
    plain = found.model_dump()
    # Networks with random weights and Fourier features amplify rounding beyond the tolerances of these tests.
    plain["network"] |= {"base_channels": 16, "dropout": 0.1, "fourier_features": []}
    plain["train"] |= {"steps": 40, "warmup_steps": 5, "batch_size": BATCH, "log_every": 10, "preview_every": 20}
    return Params.model_validate(plain)


def batch(step: int) -> Batch:
    """Images of one gray value each, a function of the step."""
    rng = np.random.default_rng(step)
    x_0 = rng.uniform(-1, 1, (BATCH, 1, 1, 1)) * np.ones(SHAPE)
    eps = rng.standard_normal((BATCH, *SHAPE), dtype=np.float32)
    t, y, u = rng.integers(0, 1000, BATCH), np.full(BATCH, -1), rng.random(BATCH)
    return Batch(x_0.astype(np.float32), t, eps, y, u, eps[:, 0, 0, :0])


@pytest.fixture
def start(device: torch.device, params: Params) -> Iterator[Start]:
    """Creates a training run at step 0 with given options, compilation and precision."""
    with starting(device, params) as begun:
        yield begun


@contextmanager
def starting(device: torch.device, params: Params) -> Iterator[Start]:
    """A block with the result of the fixture `start`."""
    held = ExitStack()

    def begun(
        compiled: bool = False,
        precision: torch.dtype = torch.bfloat16,
        where: torch.device = device,
        dropout: float = 0.1,
        **train: Any,
    ) -> tuple[State, loop.Trainer]:
        process, options = build.process(params.process), params.train.model_copy(update=train)
        torch.manual_seed(0)
        network = params.network.model_copy(update={"dropout": dropout})
        net = randomized(new_network(SHAPE, 0, network, params.process)).to(where)
        state = new_state(net, options, process.schedule)
        fetch = held.enter_context(prefetched(batch, where))
        forward = runnable(state.net, options, World(), compiled)
        return state, loop.Trainer(options, 0, process.loss, fetch, forward, precision=precision)

    with held:
        yield begun


def randomized(net: Network) -> Network:
    """Randomize the layers that are initialized to zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net
