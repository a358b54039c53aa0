"""How a network is run: whatever saves time or memory leaves what is computed as it is."""

import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.training import hardware
from diffusion.training.distributed import World
from diffusion.training.hardware import Prefetch
from flows.params import Params
from tests.machine import program
from tests.nn.networks import CONDITIONINGS, network, noise, randomize
from tests.rounding import assert_rounds_alike

CPU = torch.device("cpu")


def result(params: Params, kind: str, conditioning: str, **options: Any) -> list[Tensor]:
    """Output and gradients of a network that is run as the options say."""
    net = randomize(network((1, 8, 8), kind, conditioning, dropout=0.3)).train()
    made = hardware.runnable(net, params.train.model_copy(update=options), World(), False)
    torch.manual_seed(5)
    out = made(noise(4, 1, 8, 8), torch.tensor([1, 2, 3, 500]), None)
    out.square().mean().backward()
    return [out.detach(), *[parameter.grad for parameter in net.parameters() if parameter.grad is not None]]


@pytest.mark.parametrize(("kind", "conditioning"), CONDITIONINGS)
def test_recomputed_blocks_give_the_same_bits(params: Params, kind: str, conditioning: str) -> None:
    plain, recomputed = (result(params, kind, conditioning, recompute=value) for value in (False, True))
    assert len(plain) == len(recomputed) > 10
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_recomputed_blocks_keep_less(params: Params) -> None:
    """Counted in bytes that the way back has kept."""
    kept = []
    for recompute in (False, True):
        net = network((1, 8, 8), "unet", "film", blocks_per_level=3)
        made = hardware.runnable(net, params.train.model_copy(update={"recompute": recompute}), World(), False)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made(noise(16, 1, 8, 8), torch.arange(16), None)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.slow  # compiles C++
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch warns of itself
def test_a_compiled_network_gives_the_same_within_rounding(params: Params) -> None:
    program("g++", "g++")  # by which torch compiles on a CPU

    def without_dropout(compiled: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The output and all gradients."""
        net = randomize(network((1, 8, 8), "uvit", "adaln", depth=1, patch_size=4)).to(dtype)
        made = hardware.runnable(net, params.train, World(), compiled)
        out = made(noise(4, 1, 8, 8).to(dtype), torch.tensor([1, 2, 3, 500]), None)
        out.square().mean().backward()
        gradients = [parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None]
        return out.detach(), torch.cat(gradients)

    kinds = ((True, torch.float32), (False, torch.float32), (False, torch.float64))
    for of_each in zip(*(without_dropout(*kind) for kind in kinds), strict=True):
        assert_rounds_alike(*of_each)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_auto_is_full_precision_where_there_is_no_other(
    params: Params, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)

    def chosen(name: str, device: torch.device) -> torch.dtype:
        return hardware.precision(params.train.model_copy(update={"precision": name}), device)

    assert [chosen(name, CPU) for name in ("auto", "fp32", "bf16")] == [torch.float32, torch.float32, torch.bfloat16]
    assert chosen("auto", torch.device("cuda")) == (torch.bfloat16 if has_bf16 else torch.float32)


def test_auto_compiles_long_trainings_on_a_gpu(params: Params) -> None:
    """With a forward pass of 1 GFLOP, 128 images a step: 1e16 FLOPs are 1e16 / (3 * 128 * 1e9) = 26,042 steps."""

    def chosen(value: bool | str, device: str, steps: int) -> bool:
        options = params.train.model_copy(update={"compile": value, "steps": steps, "batch_size": 128})
        return hardware.should_compile(options, torch.device(device), lambda: 1e9)

    assert [chosen("auto", "cuda", steps) for steps in (26_041, 26_042)] == [False, True]
    assert not chosen("auto", "cpu", 10**9)
    assert [chosen(value, "cpu", 1) for value in (False, True)] == [False, True]


def test_tf32_holds_in_the_block_alone() -> None:
    def settings() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = settings()
    try:
        for outside in (("highest", False), ("medium", True)):
            torch.set_float32_matmul_precision(outside[0])
            torch.backends.cudnn.allow_tf32 = outside[1]
            with suppress(OSError), hardware.tf32():
                assert settings() == ("high", True)
                raise OSError
            assert settings() == outside
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_users_own_precision_of_the_newer_kind_stays() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with hardware.tf32():
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_next_item_is_prefetched_and_any_other_is_made_on_request() -> None:
    made, ready = list[int](), threading.Semaphore(0)

    def fetch(step: int) -> int:
        made.append(step)
        ready.release()
        return 10 * step

    with Prefetch(fetch) as prefetch:
        assert prefetch(3) == 30
        for _ in range(2):
            assert ready.acquire(timeout=60)
        assert made == [3, 4]  # made without being asked for
        assert prefetch(4) == 40
        assert prefetch(0) == 0  # the training was rolled back
        assert prefetch(1) == 10
    assert made.count(4) == 1


def test_several_threads_make_as_many_items_at_once_and_none_twice() -> None:
    made, together = list[int](), threading.Barrier(4)

    def fetch(step: int) -> int:
        made.append(step)
        if 1 <= step <= 4:
            together.wait(60)  # passes if four threads are here
        return 10 * step

    with Prefetch(fetch, threads=4) as prefetch:
        assert [prefetch(step) for step in range(8)] == [10 * step for step in range(8)]
    assert sorted(made)[:8] == [*range(8)]


def test_an_error_of_the_thread_is_raised_where_the_item_is_asked_for() -> None:
    def fetch(step: int) -> int:
        if step == 1:
            raise OSError("gone")
        return step

    with Prefetch(fetch) as prefetch:
        assert prefetch(0) == 0
        with pytest.raises(OSError, match="gone"):
            prefetch(1)
