"""What requests ask of a model, and how far they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]
"""Inputs or outputs of a graph, by name."""
AXES = {"noise": 0, "y": 0, "steps_noise": 1, "state": 1}
"""The axis of the images of an array. Other inputs (`steps`, `guidance`) must be equal within a batch."""


LAST_X_0_HAT = 2
"""Place of the last estimate of the clean images in a state."""


class Span(NamedTuple):
    """The network evaluations from `first` to `last` of those that the number of steps takes."""

    steps: int
    first: int
    last: int


Run = Callable[[Feeds, Span, ort.RunOptions], Feeds]
"""Runs some evaluations of a model, on `noise`, or on the `state` after the evaluations before; returns this state, or
the outputs after the last one. Raises any exception if the options' `terminate` is set meanwhile."""


Observe = Callable[[float, float, int, Span, int], None]
"""Called after a slice was run: with when (time.perf_counter) and for how many seconds, the number of its images, its
evaluations, and the number of images of all slices that were run together."""


class Pace:
    """How long a model takes for an evaluation of an image: a moving average."""

    def __init__(self, seconds: float = 0.0) -> None:
        """seconds: the first estimate, 0 for none."""
        self.seconds = seconds

    def add(self, seconds: float) -> None:
        """Add a measurement."""
        self.seconds = 0.7 * self.seconds + 0.3 * seconds if self.seconds else seconds

    def within(self, seconds: float) -> int:
        """How many evaluations of an image take some seconds; 0 before the first measurement."""
        return int(seconds / self.seconds) if self.seconds else 0


@dataclass(frozen=True)
class Work:
    """What a request asks of a model."""

    count: int
    """Number of images."""
    steps: int
    """Number of sampling steps."""
    evaluations: int
    """Number of network evaluations that these take."""
    common: Feeds
    """The inputs that all images have in common."""
    part: Callable[[int, int, Span], Feeds]
    """The other inputs of the images from start to stop; called in another thread, right before they are needed."""
    pace: Pace = field(default_factory=Pace)
    """How long these take."""
    progress: Callable[[int, int, NDArray[np.float32]], None] | None = None
    """If given, as many images as possible form together, and each slice ends with a call: the first image, the number
    of evaluations so far, and the estimate x_0_hat of the clean images (n, C, H, W)."""
    every: int = 0
    """With `progress`, the number of evaluations after which there must be a call."""

    observe: Observe = lambda *_: None

    @property
    def seconds(self) -> float:
        """Seconds that it takes alone; 0 if the pace is not known."""
        return self.count * self.evaluations * self.pace.seconds

    @property
    def weight(self) -> float:
        """Cost of an evaluation of an image: seconds, or 1 as long as the pace is not known."""
        return self.pace.seconds or 1.0

    @classmethod
    def of(cls, feeds: Feeds, steps: int, evaluations: int, pace: Pace) -> Work:
        """The work of running a model on all its inputs."""
        own = {name: value for name, value in feeds.items() if name in AXES}

        def part(start: int, stop: int, span: Span) -> Feeds:
            found = {name: value[(slice(None),) * AXES[name] + (slice(start, stop),)] for name, value in own.items()}
            if "steps_noise" in found:
                found["steps_noise"] = found["steps_noise"][span.first : span.last]
            return found

        common = {name: value for name, value in feeds.items() if name not in AXES}
        return cls(len(feeds["noise"]), steps, evaluations, common, part, pace)


@dataclass
class Group:
    """The images of a job that form together, from start to stop."""

    start: int
    stop: int
    done: int = 0
    """Number of their evaluations that are done."""
    state: NDArray[np.float32] | None = None
    """After these."""

    @property
    def size(self) -> int:
        return self.stop - self.start


class Job:
    """A request in progress."""

    def __init__(self, run: Run, work: Work, client: str, served: float) -> None:
        loop = asyncio.get_running_loop()
        self.run, self.work, self.client, self.since = run, work, client, loop.time()
        self.served = served
        """Cost of what was done for it, plus its client's clock when it came."""
        self.started = 0
        """Number of images that are done or being done."""
        self.group: Group | None = None
        """Those that are being done."""
        self.key: Hashable = (run, work.steps, *((name, work.common[name].tobytes()) for name in sorted(work.common)))
        """Equal for jobs that can be joined: same model, same number of steps, same common inputs."""
        self.parts: dict[int, Feeds] = {}
        """Outputs, by the first image that they are of."""
        self.outputs: asyncio.Future[Feeds] = loop.create_future()

    @property
    def left(self) -> int:
        """Number of images that have not been started."""
        return self.work.count - self.started

    @property
    def held(self) -> int:
        """Number of images that have not been started, or are waiting between slices."""
        return self.left + (self.group.size if self.group and self.group.done else 0)

    @property
    def done(self) -> int:
        """Number of evaluations that the next images have behind them."""
        return self.group.done if self.group else 0

    @property
    def seconds(self) -> float:
        """Seconds that what is left takes; 0 if the pace is not known."""
        group = self.group.size * (self.work.evaluations - self.group.done) if self.group else 0
        return (self.left * self.work.evaluations + group) * self.work.pace.seconds

    def add(self, start: int, outputs: Feeds) -> None:
        """Add the outputs of the images that begin with `start`; the last ones complete the job."""
        self.parts[start] = outputs
        if not self.left and not self.outputs.done():
            parts = list(self.parts.values())
            self.outputs.set_result({name: np.concatenate([part[name] for part in parts]) for name in outputs})
