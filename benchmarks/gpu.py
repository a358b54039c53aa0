"""Training and sampling on a GPU: whether they are right, and how fast they are; one JSON line per measurement.

    python benchmarks/gpu.py --minutes 8 --out benchmarks/results/gpu.jsonl
    python benchmarks/gpu.py --rehearse                                  # tiny, on the CPU

It needs torch (2.11 or later), numpy, onnx, ONNX Runtime, pydantic, ruamel.yaml, pillow, safetensors and pytest. The
most important measurements come first; those for which no time is left are skipped. `--only NAME,NAME` chooses some.
Networks are trained on images of random pixels in memory, except in `stages`, which runs the stages' own commands.
"""

import argparse
import copy
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_checks import SHAPES, Bench, Facts, gpu_tests, pairs, stages
from torch import Tensor, nn

from diffusion.model import Config, Model, new_network
from diffusion.process import build
from diffusion.sampling.build import SampleOptions, sampling_timesteps
from diffusion.sampling.sampler import sample
from diffusion.training import loop

PEAK_BF16 = 989e12
"""FLOP/s of dense bfloat16 by the data sheet of the H100 and H200 SXM."""


def ceilings(bench: Bench) -> Iterator[Facts]:
    """Products of 8192 x 8192 matrices, and copies, as fast as they go."""
    side = 256 if bench.rehearse else 8192
    facts: Facts = {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True)):
        a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        facts[f"{name}_tflops"] = round(2 * side**3 / bench.seconds(lambda a=a, b=b: a @ b, 20) / 1e12, 1)  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(2**20 if bench.rehearse else 2**32, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    facts["copy_tb_per_s"] = round(2 * len(source) / bench.seconds(lambda: target.copy_(source), 10) / 1e12, 2)
    yield facts


def throughput(bench: Bench) -> Iterator[Facts]:
    """Images a second of the training step, by preset, precision, compilation and batch, on batches in memory."""
    cases = [
        ("digits", 128, "bf16", False),
        ("digits", 128, "bf16", True),
        ("cifar10", 128, "bf16", True),
        ("cifar10", 512, "bf16", True),
        ("cifar10", 128, "bf16", False),
        ("cifar10", 128, "fp32", False),
        ("fashion-mnist", 32, "bf16", False),
        ("fashion-mnist", 32, "bf16", True),
    ]
    for preset, size, dtype, compiled in cases:
        if bench.rehearse and (compiled or preset != "digits"):
            continue
        began = time.perf_counter()
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()
        state, trainer = bench.training(preset, batch_size=size, precision=dtype, compile=compiled)
        loop.step(state, trainer)
        bench.finish()
        first = time.perf_counter() - began
        seconds = bench.seconds(lambda state=state, trainer=trainer: loop.step(state, trainer), 20)  # type: ignore[misc]
        yield {
            "preset": preset,
            "batch_size": size,
            "precision": dtype,
            "compiled": compiled,
            "images_per_s": round(size / seconds),
            "ms_per_step": round(1000 * seconds, 2),
            "share_of_peak": round(3 * bench.flops * size / seconds / PEAK_BF16, 3),
            "first_step_s": round(first, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if bench.cuda else None,
        }


def peer(bench: Bench) -> Iterator[Facts]:
    """diffusers' UNet2DModel of the same size: the step of its training example, as it is and at its best."""
    from diffusers import UNet2DModel

    UNet: Any = UNet2DModel  # diffusers has no types
    widths = (32, 64, 64, 64) if bench.rehearse else (128, 256, 256, 256)
    torch.use_deterministic_algorithms(False)
    cases = [("example", 128, False, False), ("example, bf16", 128, True, False), ("best", 128, True, True)]
    for name, size, bf16, best in [*cases, ("best", 512, True, True)]:
        if bench.rehearse and (best or bf16):
            continue
        net: Any = UNet(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            dropout=0.1,
        ).to(bench.device)
        if best:
            net = net.to(memory_format=torch.channels_last)
            net.compile()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=best or None)
        average = copy.deepcopy(net)
        _, trainer = bench.training("cifar10", batch_size=size, compile=False)
        x_0, t, eps, _, _ = (torch.from_numpy(array).to(bench.device) for array in trainer.fetch(0))
        x_t = trainer.loss.schedule.diffuse(x_0, t, eps)
        if best:
            x_t, eps = (x.to(memory_format=torch.channels_last) for x in (x_t, eps))

        def step(
            net: Any = net, optimizer: Any = optimizer, average: Any = average,
            x_t: Tensor = x_t, t: Tensor = t, eps: Tensor = eps, bf16: bool = bf16,
        ) -> None:  # fmt: skip
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
                loss = nn.functional.mse_loss(net(x_t, t).sample.float(), eps)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 0.001)

        seconds = bench.seconds(step, 20)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        yield {
            "peer": name,
            "parameters": parameters,
            "batch_size": size,
            "images_per_s": round(size / seconds),
            "ms_per_step": round(1000 * seconds, 2),
        }
    torch.use_deterministic_algorithms(bench.cuda)


def profile(bench: Bench) -> Iterator[Facts]:
    """One step: waits for the GPU, launches, share of the time in which the GPU works, and in which kernels."""
    for preset, compiled in (("digits", False), ("cifar10", False)):
        if bench.rehearse and compiled:
            continue
        state, trainer = bench.training(preset, compile=compiled)
        for _ in range(3):
            loop.step(state, trainer)
        found: Facts = {"preset": preset, "compiled": compiled}
        if bench.cuda:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                loop.step(state, trainer)
                torch.cuda.set_sync_debug_mode("default")
            found["waits"] = len([each for each in waits if "synchronizing" in str(each.message)])
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * bench.cuda
        bench.finish()
        with torch.profiler.profile(activities=kinds) as profiler:
            began = time.perf_counter()
            for _ in range(3):
                loop.step(state, trainer)
            bench.finish()
            spent = time.perf_counter() - began
        # An annotation, such as that of an optimizer's step, spans kernels and the gaps between them.
        kernels = [
            event
            for event in profiler.events()
            if event.device_type.name == "CUDA" and not event.name.startswith("Optimizer.")
        ]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
        by_name: dict[str, float] = {}
        for event in kernels:
            by_name[event.name[:60]] = by_name.get(event.name[:60], 0) + event.time_range.elapsed_us() / 3000
        found |= {"launches": len(kernels) // 3, "ms": round(spent / 3 * 1000, 1), "busy": round(busy / spent, 3)}
        found["ms_by_kernel"] = {n: round(v, 2) for n, v in sorted(by_name.items(), key=lambda item: -item[1])[:10]}
        yield found


def sampling(bench: Bench) -> Iterator[Facts]:
    """Images a second of a 10-step sampler (dpm-solver++) of the network of cifar10."""
    params, size = bench.params("cifar10"), 4 if bench.rehearse else 256
    process = build.process(params.process)
    options = SampleOptions.model_validate(
        params.sample.model_dump() | {"sampler": "dpm-solver++", "steps": 10, "spacing": "quadratic"}
    )
    shape = SHAPES["cifar10"]
    for tf32, compiled in ((False, False), (True, False), (True, True)):
        if bench.rehearse and compiled:
            continue
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        net = new_network(shape, 0, params.network, params.process).to(bench.device).eval().requires_grad_(False)
        if compiled:
            net.compile(dynamic=False)
        config = Config(shape=shape, classes=(), network=params.network, process=params.process, x_0_mse=None)
        sampler = Model(net, process, config).sampler(options)
        visited = sampling_timesteps(options, process.schedule)
        x = torch.randn(size, *shape, device=bench.device).to(memory_format=torch.channels_last)

        def draw(sampler: Any = sampler, x: Tensor = x, visited: list[int] = visited) -> None:
            with torch.inference_mode():
                sample(sampler, lambda _: x, visited)

        rate = round(size / bench.seconds(draw, 1))
        yield {"precision": "tf32" if tf32 else "fp32", "compiled": compiled, "images_per_s": rate}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


MEASUREMENTS: list[Callable[[Bench], Iterator[Facts]]] = [
    ceilings, gpu_tests, stages, profile, throughput, peer, pairs, sampling,
]  # fmt: skip


def main() -> None:
    names = [measure.__name__ for measure in MEASUREMENTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of the trainings in `stages` (default 300)")
    parser.add_argument("--minutes", type=float, default=8.0, help="no measurement begins after these (default 8)")
    parser.add_argument("--out", type=Path, help="file to which the lines are written as well")
    parser.add_argument("--only", default=",".join(names), help=f"some of {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --rehearse runs everything tiny on the CPU")
    deadline = time.monotonic() + 60 * arguments.minutes
    bench = Bench(arguments.rehearse, arguments.steps)
    lines = []

    def write(line: Facts) -> None:
        lines.append(json.dumps(line))
        print(lines[-1], flush=True)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")

    device = torch.cuda.get_device_name() if bench.cuda else "CPU, rehearsal"
    write({"measurement": "machine", "device": device, "torch": torch.__version__, "cuda": torch.version.cuda})
    for measure in MEASUREMENTS:
        if measure.__name__ not in arguments.only.split(",") or time.monotonic() > deadline:
            continue
        try:
            for facts in measure(bench):
                write({"measurement": measure.__name__, **facts})
        except Exception as error:  # whatever fails, the rest is still measured
            traceback.print_exc()
            write({"measurement": measure.__name__, "error": f"{type(error).__name__}: {error}"[-1500:]})


if __name__ == "__main__":
    main()
