"""A profile of the training step."""

import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from gpu_measurements.bench import NO_TIME, Action, Bench, Facts

KINDS = [
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("elementwise", r"triton_poi"),
        ("normalization", r"triton_(red|per)\w*norm"),
        ("reduction", r"triton_(red|per)"),
        ("matrix product", r"triton_tem"),
        ("copy", r"memcpy|memset|copy|fill|nchwToNhwc|nhwcToNchw|CatArray"),
        ("optimizer", r"multi_tensor|adam|_foreach"),
        ("random", r"distribution|philox|dropout|bernoulli"),
        ("normalization", r"native_\w+_norm|layer_norm|RowwiseMoments|FusedParams"),
        ("normalization", r"GammaBeta|ComputeInternalGradients"),
        ("elementwise", r"elementwise"),
        ("reduction", r"reduce|softmax"),
        ("attention", r"flash|fmha|sdpa|attention"),
        ("convolution", r"conv|fprop|dgrad|wgrad|implicit_gemm"),
        ("matrix product", r"gemm|gemv|nvjet|cutlass|aten::(add|b|badd)?mm"),
    )
]
"""Kinds of kernels, and patterns of their names; the first match counts.

Inductor names a kernel after all fused operations, so its prefix decides: pointwise (poi), reduction (red, per), or
matrix product template (tem).
"""


def kind_of(kernel: str) -> str:
    """The kind of a kernel, from its name; "other" if no pattern matches."""
    return next((kind for kind, pattern in KINDS if pattern.search(kernel)), "other")


def profile(bench: Bench) -> Iterator[Facts]:
    """A training step of cifar10: time by kind of kernel, GPU utilization, launches and synchronizations.

    `ms_per_step` is measured without the profiler, `ms_profiled` and the rest with it.
    """
    for compiled in (True, False):
        if bench.left() < 0:
            yield {"compiled": compiled, "skipped": NO_TIME}
            return
        size, steps = bench.best_batch, 1 if bench.rehearse else 3
        training = bench.training("cifar10", batch_size=size, precision="bf16", compile=compiled)
        seconds = bench.seconds(training.step, times=steps)
        facts: Facts = {"batch_size": size, "compiled": compiled, "ms_per_step": round(1000 * seconds, 2)}
        if bench.cuda:
            facts["waits"] = waits(training.step)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
        bench.finish()
        with torch.profiler.profile(activities=activities) as profiler:
            began = time.perf_counter()
            for _ in range(steps):
                training.step()
            bench.finish()
            spent = time.perf_counter() - began
        yield (
            facts
            | {"ms_profiled": round(1000 * spent / steps, 2)}
            | summary(profiler.events(), spent, steps, bench.cuda)
        )


def waits(step: Action) -> int:
    """Number of GPU synchronizations in a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in caught)


def summary(events: Iterable[FunctionEvent], spent: float, steps: int, on_gpu: bool) -> Facts:
    """Summarize the events of `steps` steps that took `spent` seconds; without a GPU, operations instead of kernels."""
    events = list(events)
    if on_gpu:  # an annotation, such as that of a compiled graph, spans kernels and the gaps between them
        of_gpu = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
        kernels = [event for event in of_gpu if not event.name.startswith(("Optimizer.", "ProfilerStep"))]
    else:
        kernels = [event for event in events if event.name.startswith("aten::")]
    by_kind, by_name = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in kernels:
        microseconds = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        milliseconds = microseconds / 1000 / steps
        by_kind[kind_of(event.name)] += milliseconds
        by_name[event.name[:80]] += milliseconds
    launches = [event for event in events if re.match(r"cu(da)?(Graph)?Launch", event.name)]
    busy = union((event.time_range.start, event.time_range.end) for event in kernels) / 1e6
    return {
        "busy": round(busy / spent, 3),
        "kernels": len(kernels) // steps,
        "launches": len(launches) // steps,
        "ms_by_kind": _largest(by_kind, len(by_kind)),
        "ms_by_kernel": _largest(by_name, 12),
    }


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Total length covered by intervals (start, end)."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _largest(values: dict[str, float], count: int) -> dict[str, float]:
    return {name: round(value, 3) for name, value in sorted(values.items(), key=lambda item: -item[1])[:count]}
