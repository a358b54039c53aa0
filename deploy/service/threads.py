"""The threads of ONNX Runtime: those that make most images per second, measured when a model is first loaded."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from deploy.service.models import Model, Threads

BATCH = 8
"""Images of a batch that is measured, at least one for each thread; fewer if the model is slow."""
STEPS = 10
"""Its steps; fewer if the model is slow, or has fewer."""
SECONDS = 0.2
"""Time to measure a number of threads."""
MAX_SECONDS = 1.0
"""Time to measure them all; no further number is tried after it."""
TOLERANCE = 0.95
"""The smallest number of threads with this fraction of the highest speed is used, as the rest of the service needs
cores, too."""
SPLIT_GAIN = 1.1
"""How much faster a split batch must be, as a single image cannot be split."""


class Loader:
    """Loads models, with a number of threads that is measured for the first version of each."""

    def __init__(self, device: str, threads: int) -> None:
        """Create a loader.

        Args:
            device: `auto`, `cpu` or `cuda`.
            threads: number of threads; 0 to measure it.
        """
        self._device, self._threads = device, Threads(threads) if threads else None
        self._chosen: dict[str, Threads] = {}

    def __call__(self, content: bytes, version: str | None, name: str) -> Model:
        """Load a model; raises RejectedModel."""
        threads = self._threads or self._chosen.get(name)
        if threads:
            return Model(content, version, name, self._device, threads)
        model = Model(content, version, name, self._device, Threads(cpus()))
        if model.device == "cpu":
            rates = measure(model)
            best = self._chosen[name] = preferred(rates)
            if best != model.threads:
                del model  # so that only one is in memory
                model = Model(content, version, name, self._device, best)  # runs the golden test with it
            speeds = ", ".join(f"{rate:.3g} with {tried}" for tried, rate in rates.items())
            model.reason = f" (images x steps/s: {speeds})"
        return model


def measure(model: Model) -> dict[Threads, float]:
    """Images per second and step: with the threads of a model, with as many on a split batch, then with fewer."""
    most = model.threads.number
    possible = int(SECONDS / 3 / (model.pace.seconds * model.evaluations(1)))
    batch = max(1, min(max(BATCH, most), possible))
    steps = max(1, min(STEPS, model.steps, possible // batch))
    ends = time.perf_counter() + MAX_SECONDS
    rates = {model.threads: rate(model, batch, steps)}
    if 1 < most <= batch:
        split = Threads(most, split=True)
        rates[split] = rate(model.with_threads(split), batch, steps)
    fastest = rates[model.threads]
    for number in candidates(most, cores()):
        if time.perf_counter() > ends:
            break
        fewer = Threads(number)
        rates[fewer] = rate(model.with_threads(fewer), batch, steps)
        if rates[fewer] < TOLERANCE * fastest:
            break  # still fewer would be slower still
        fastest = max(fastest, rates[fewer])
    return rates


def preferred(rates: dict[Threads, float]) -> Threads:
    """The fewest threads that are about as fast as the fastest, on a split batch only if that is clearly faster."""
    compared = {threads: rate / SPLIT_GAIN if threads.split else rate for threads, rate in rates.items()}
    return min(threads for threads, rate in compared.items() if rate >= TOLERANCE * max(compared.values()))


def candidates(most: int, physical: int) -> list[int]:
    """Numbers of threads to try besides `most`, in descending order: powers of two, and one per physical core."""
    return sorted({physical, *(2**power for power in range(most.bit_length()))} & set(range(1, most)), reverse=True)


def rate(model: Model, batch: int, steps: int) -> float:
    """Images per second and step, in the fastest of several runs."""
    model.sample(batch, steps)
    best, ends = math.inf, time.perf_counter() + SECONDS
    while best == math.inf or time.perf_counter() < ends:
        began = time.perf_counter()
        model.sample(batch, steps)
        best = min(best, time.perf_counter() - began)
    return batch * steps / best


def cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Number of CPUs that this process may use at a time, by its affinity and the quota of its container."""
    return math.ceil(min(len(os.sched_getaffinity(0)), quota(cgroups, own)))


def quota(cgroups: Path, own: Path) -> float:
    """CPU time per time that the control groups (v2, or else v1) of this process allow; infinite without a limit."""
    limits = [math.inf]
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except OSError:
        return math.inf
    for controllers, path in groups:
        if not controllers or "cpu" in controllers.split(","):
            root = cgroups / "cpu" if controllers else cgroups
            folder = root / path.strip("/")
            for each in (folder, *folder.parents):  # in a container, the path may be that on the host
                if each.is_relative_to(root):
                    limits.append(_limit(each))
    return min(limits)


def _limit(folder: Path) -> float:
    """The quota of one control group."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            used, period = " ".join((folder / name).read_text() for name in names).split()
            return float(used) / float(period) if float(used) > 0 else math.inf
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return math.inf


def cores() -> int:
    """Number of physical cores among the CPUs of this process; 0 if it is not known."""
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(topology.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})
    except OSError:
        return 0
