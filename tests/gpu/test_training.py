"""Training and sampling on a GPU: agreement with the CPU, and determinism."""

import copy
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.errors import Stopped
from diffusion.model import Config, Model, new_network
from diffusion.nn import build as networks
from diffusion.process import build
from diffusion.process.likelihood import Bound
from diffusion.process.parameterization import Eps
from diffusion.sampling.build import SampleOptions, sampling_timesteps
from diffusion.sampling.sampler import sample
from diffusion.training import loop, optim
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.hardware import prefetched
from diffusion.training.state import State
from flows.params import Params
from tests.gpu.conftest import REHEARSAL, SHAPE, Start, batch, randomized, starting

if not (REHEARSAL or torch.cuda.is_available()):
    pytest.skip("needs a GPU", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch warns of itself

EPS = torch.finfo(torch.float32).eps


def losses(state: State, trainer: loop.Trainer, steps: int) -> list[float]:
    """The mean loss of each step."""
    found = []
    for _ in range(steps):
        state.sums.zero_()
        loop.step(state, trainer)
        found.append(state.sums[1].item())
    return found


def assert_same(one: State, other: State) -> None:
    tensors, expected = one.tensors(), other.tensors()
    assert tensors.keys() == expected.keys()
    assert [name for name, tensor in tensors.items() if not tensor.equal(expected[name])] == []


def test_the_gradient_is_that_of_the_cpu(start: Start, device: torch.device) -> None:
    """In float32, to within the rounding of some thousand terms."""
    state, trainer = start()
    gradients = []
    for where, net in ((device, state.net), (torch.device("cpu"), copy.deepcopy(state.net).cpu())):
        x_0, t, eps, y, *_ = (torch.from_numpy(array).to(where) for array in batch(0))
        trainer.loss(net.eval(), x_0, t, eps, y).mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten().cpu() for parameter in net.parameters()]))  # type: ignore[union-attr]
    found, expected = gradients
    assert (found - expected).norm() < 1000 * EPS * expected.norm()


def test_a_step_changes_the_weights_as_on_the_cpu(start: Start, device: torch.device) -> None:
    """In float32, with TF32 (10 bits of mantissa) on the GPU: closer than a step in bfloat16 (7 bits) on the CPU.

    Without dropout, since each device draws its own, and with AdamW, since Muon computes in bfloat16 on a GPU.
    """

    def change(where: torch.device, dtype: torch.dtype) -> torch.Tensor:
        state, trainer = start(where=where, precision=dtype, dropout=0.0, optimizer="adamw")
        before = torch.cat([parameter.detach().flatten().clone() for parameter in state.net.parameters()])
        loop.step(state, trainer)
        return (torch.cat([parameter.detach().flatten() for parameter in state.net.parameters()]) - before).cpu()

    cpu = torch.device("cpu")
    expected, narrow = change(cpu, torch.float32), change(cpu, torch.bfloat16)
    assert 0 < (narrow - expected).norm() < 0.5 * expected.norm()
    assert (change(device, torch.float32) - expected).norm() < 0.5 * (narrow - expected).norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_training_twice_gives_the_same_bytes(start: Start, compiled: bool) -> None:
    states = []
    for _ in range(2):
        state, trainer = start(compiled)
        losses(state, trainer, 5)
        states.append(state)
    assert_same(*states)


def trained(
    start: Start, directory: Path, stop_at: int | None = None, die_at: int | None = None, **train: object
) -> State:
    """Train with checkpoints to the end, or to a step at which a signal stops training or kills this process."""
    state, trainer = start(steps=30, **train)
    checkpoints = Checkpoints(directory)
    checkpoints.restore(state)

    def report(state: State) -> None:
        if state.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.step % 10 == 0:
            trainer.add_point(state)

    loop.train(
        state,
        trainer,
        checkpoints,
        report=report,
        preview=lambda state: state.heldout_curve.append({"step": state.step, "mse": 1.0}),
        stop_signal=lambda: signal.SIGTERM * (state.step == stop_at),
    )
    return state


def test_a_training_that_was_stopped_and_killed_resumes_to_the_same_bytes(
    start: Start, params: Params, device: torch.device, tmp_path: Path
) -> None:
    """The process is killed six steps after its last checkpoint."""
    interrupted = tmp_path / "interrupted"
    with pytest.raises(Stopped):
        trained(start, interrupted, stop_at=17)
    dying = multiprocessing.get_context("spawn").Process(target=die, args=(device, params, interrupted))
    dying.start()
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    assert [int(path.stem) for path in interrupted.glob("0*.json")][-1:] == [20]
    assert_same(trained(start, interrupted), trained(start, tmp_path / "whole"))


def die(device: torch.device, params: Params, directory: Path) -> None:
    """Resume training, and be killed at step 26."""
    networks.device(str(device))  # a new process: its kernels are to be deterministic too
    with starting(device, params) as start:
        trained(start, directory, die_at=26)


def test_bfloat16_learns_as_float32_does(start: Start) -> None:
    narrow, full = (np.array(losses(*start(precision=dtype), 40)) for dtype in (torch.bfloat16, torch.float32))
    assert full[-10:].mean() < 0.8 * full[0]
    assert narrow[-10:].mean() == pytest.approx(full[-10:].mean(), rel=0.05)


def test_weights_optimizers_and_average_are_in_float32(start: Start) -> None:
    state, trainer = start()
    loop.step(state, trainer)
    narrow = {torch.float16, torch.bfloat16}
    assert [name for name, tensor in state.tensors().items() if tensor.dtype in narrow] == []


@pytest.mark.parametrize("timesteps", ["uniform", "rms-error"])
def test_a_step_does_not_wait_for_the_gpu(start: Start, device: torch.device, timesteps: str) -> None:
    state, trainer = start(timesteps=timesteps)
    losses(state, trainer, 3)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step(state, trainer)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_is_not_finite_is_skipped(start: Start, device: torch.device) -> None:
    state, trainer = start(timesteps="uniform")
    losses(state, trainer, 2)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    spoiled = batch(2)
    spoiled.x_0[3] = np.nan
    with prefetched(lambda _: spoiled, device) as fetch:
        loop.step(state, loop.Trainer(trainer.options, 0, trainer.loss, fetch, state.net))
    assert (state.step, state.skipped) == (3, 1)
    changed = [name for name, tensor in state.tensors().items() if not tensor.equal(before[name])]
    assert changed
    assert all(name.startswith("average.") for name in changed)


def test_matrices_of_one_bank_are_as_orthogonal_as_alone(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in [(16, 144), (144, 16), (32, 32), (16, 288)]]
    exact = optim.orthogonalize([matrix.double() for matrix in matrices])
    alone = [optim.orthogonalize([matrix.to(device)])[0] for matrix in matrices]
    together = optim.orthogonalize([matrix.to(device) for matrix in matrices])
    for one, other, right in zip(together, alone, exact, strict=True):
        error, expected = ((found.double().cpu() - right).abs().max() for found in (one, other))
        assert error <= 4 * expected


def test_last_layers_are_in_float32_under_autocast(start: Start, device: torch.device) -> None:
    """x_0_hat of an eps network near pure noise, where its coefficient is large; from the same features in float64."""
    state, trainer = start()
    net, t = state.net.eval(), torch.full((4,), 990, device=device)
    features: list[torch.Tensor] = []
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        net.head.register_forward_pre_hook(lambda _, given: features.append(given[0]))  # type: ignore[union-attr]
        x_t = torch.randn(4, *SHAPE, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            out = net(x_t, t)
        exact = copy.deepcopy(net.head).double()(features[0].double())  # type: ignore[operator]
        made = Eps(trainer.loss.schedule)
        error = (made.to_x_0(out, x_t, t) - made.to_x_0(exact, x_t.double(), t)).abs().max()
        a, b = (coefficient.abs().max() for coefficient in made.coefficients(t))
    assert out.dtype == torch.float32
    assert error <= 100 * EPS * (a * x_t.abs().max() + b * exact.abs().max())  # bfloat16 would round by 2^16 EPS


@torch.inference_mode()
def test_samples_and_likelihood_are_those_of_the_cpu(params: Params, device: torch.device) -> None:
    torch.manual_seed(0)
    net = randomized(new_network(SHAPE, 0, params.network, params.process)).eval()
    config = Config(shape=SHAPE, classes=(), network=params.network, process=params.process, x_0_mse=None)
    process, T = build.process(params.process), params.process.num_timesteps
    options = SampleOptions.model_validate(params.sample.model_dump() | {"sampler": "ddim", "steps": 10})
    generator = torch.Generator().manual_seed(1)
    x_0, eps = (torch.randn(T, *SHAPE, generator=generator) for _ in range(2))
    drawn, terms = [], []
    for where in (device, torch.device("cpu")):
        model = Model(copy.deepcopy(net).to(where), process, config)
        visited = sampling_timesteps(options, process.schedule)
        drawn.append(sample(model.sampler(options), lambda _, where=where: eps[:2].to(where), visited).cpu())  # type: ignore[misc]
        bound = Bound(process.denoiser(model.net_for()), model.variance("fixed-small"))
        terms.append(bound.term(x_0.clamp(-1, 1).to(where), torch.arange(T).to(where), eps.to(where)).cpu())
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)
    assert terms[0].dtype == torch.float64
    torch.testing.assert_close(*terms, rtol=1e-3, atol=0)
