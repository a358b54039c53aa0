"""A model: verified before use, and run by ONNX Runtime."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploy.service import loop
from deploy.service.work import AXES, Feeds, Pace, Span
from diffusion.errors import counted
from diffusion.export import digest, golden, runtime

METADATA_VERSION = "2"
DATATYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64", "tensor(uint8)": "UINT8"}


class ModelError(Exception):
    """The model is not available now; the message is one line."""


class RejectedModel(ModelError):
    """The model is unusable, and retrying does not help."""


class Tensor(NamedTuple):
    """Type and shape of a graph's input or output; -1 stands for any size."""

    datatype: str
    shape: tuple[int, ...]


class Threads(NamedTuple):
    """How the CPU runs a model."""

    number: int
    split: bool = False
    """Whether a batch is split, and each thread runs the model on its part; else all threads share each operator."""

    def __str__(self) -> str:
        return f"{counted(self.number, 'thread')}{' on a split batch' if self.split else ''}"


ONE = Threads(1)


class Model:
    """A verified sampler in ONNX Runtime."""

    reason = ""
    """Why it has this number of threads, for the log."""

    def __init__(
        self,
        content: bytes,
        version: str | None = None,
        name: str = "ddpm",
        device: str = "cpu",
        threads: Threads = ONE,
    ) -> None:
        """Check the digest of a sampler.onnx, load it and run its golden test, which also warms it up.

        Args:
            content: the bytes of the file.
            version: its version; None for the first 12 digits of the weights' digest.
            name: the name that it is served by.
            device: `auto`, `cpu` or `cuda`.
            threads: those of ONNX Runtime.

        Raises:
            RejectedModel: the file is damaged or not a sampler, its golden test fails, or the device is unavailable.
        """
        try:
            digest.check(content)
        except ValueError as error:
            raise RejectedModel(str(error)) from None
        try:
            ort.set_default_logger_severity(4)  # errors are raised as well
            session = runtime.session(content, None if device == "cpu" else 0, threads.number)
            facts = session.get_modelmeta().custom_metadata_map
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise RejectedModel(f"not an ONNX model that ONNX Runtime can run ({golden.brief(error)})") from None
        if device == "cuda" and runtime.CUDA not in session.get_providers():
            raise RejectedModel(
                "ONNX Runtime finds no CUDA; use --device cpu, or install onnxruntime-gpu and its libraries"
            )
        self.provider = session.get_providers()[0]
        self.device = "cuda" if self.provider == runtime.CUDA else "cpu"
        self.inputs, self.outputs = _tensors(session.get_inputs()), _tensors(session.get_outputs())
        if "noise" not in self.inputs or "images" not in self.outputs:
            raise RejectedModel("not a sampler.onnx: it has no input `noise` or no output `images`")
        if facts.get("ddpm.version") != METADATA_VERSION:
            raise RejectedModel(
                f"its ddpm.version is {facts.get('ddpm.version')}, but this service supports {METADATA_VERSION}"
            )
        try:
            golden.check(session, facts)
            self.weights = facts["ddpm.weights_sha256"]
            self.classes: list[str] = json.loads(facts["ddpm.classes"])
            self.steps, self.guidance = int(facts["ddpm.steps"]), float(facts["ddpm.guidance"])
            # Earlier versions did not write this key.
            free = facts.get("ddpm.max_free_steps", runtime.MAX_FREE_STEPS)
            self._max_steps = min(int(free), int(facts["ddpm.num_timesteps"]))
            self._ranges: dict[str, tuple[int, int]] = json.loads(facts["ddpm.ranges"])
        except Exception as error:  # an edited file may contain anything
            raise RejectedModel(golden.brief(error)) from None
        self.name, self.version = name, version or self.weights[:12]
        self.digest = hashlib.sha256(content).hexdigest()  # the same weights can be exported with different settings
        self.shape = self.inputs["noise"].shape[1:]
        self.stochastic = "steps_noise" in self.inputs
        try:
            self._loop = loop.extract(content)
            self._facts = facts
            self._use(threads)
            self._check_loop(session)
        except Exception as error:  # likewise
            raise RejectedModel(golden.brief(error)) from None

    @property
    def summary(self) -> str:
        """What runs, and where."""
        place = f"{self.provider} ({self.device}), {self.threads}{self.reason}"
        return f"version {self.version} (weights {self.weights[:12]}) with {place}"

    def _use(self, threads: Threads) -> None:
        """Create the session of the loop."""
        self.threads = threads
        own = 1 if threads.split else threads.number
        self.session = runtime.session(self._loop.graph, 0 if self.device == "cuda" else None, own)
        self._pool = ThreadPoolExecutor(threads.number, "images") if threads.split else None
        self._places = {
            each.name: "cuda" if place.name.lower() == "cuda" else "cpu"
            for each, place in zip(self.session.get_inputs(), self.session.get_input_memory_infos(), strict=True)
        }

    def with_threads(self, threads: Threads) -> Model:
        """The same model in a session with other threads, in which it has not been tested."""
        other = copy.copy(self)
        other._use(threads)
        return other

    def _check_loop(self, whole: ort.InferenceSession) -> None:
        """Raise ValueError unless the loop makes the images of the whole graph in one step; measure its pace."""
        (expected,) = whole.run(["images"], self._inputs(golden.BATCH, 1))
        found = self.sample(golden.BATCH)["images"]
        began = time.perf_counter()
        self.sample(golden.BATCH)
        self.pace = Pace((time.perf_counter() - began) / (golden.BATCH * self.evaluations(1)))
        if np.abs(found.astype(int) - expected).max() > 1:  # a GPU may round differently
            raise ValueError("its loop computes other images than the whole graph")

    def _inputs(self, images: int, steps: int) -> Feeds:
        return golden.inputs(self.inputs, {**self._facts, "ddpm.steps": str(steps)}, golden.SEED, images)

    def sample(self, images: int, steps: int = 1) -> Feeds:
        """Make some images from the noise of the golden test."""
        return self.run(self._inputs(images, steps), Span(steps, 0, self.evaluations(steps)))

    def problem(self, name: str, value: NDArray[Any]) -> str:
        """Describe the first invalid value of an input and the allowed range; empty if all are valid."""
        if name == "steps":
            steps = int(value[0])
            return "" if steps == 0 or self.allows(steps) else f"{self.allowed(name)} (got {steps})"
        low, high = self._ranges[name]
        wrong = value[~((value >= low) & (value <= high))]  # NaN too
        return f"{self.allowed(name)} (got {wrong[0]:.9g})" if wrong.size else ""

    def allowed(self, name: str) -> str:
        """Describe the allowed values of an input."""
        if name == "steps":
            return f"must be {self.steps_allowed}, or 0 for {self.steps}"
        low, high = self._ranges[name]
        return f"must be from {low} to {high}" + (", -1 for no class" if name == "y" else "")

    def allows(self, steps: int) -> bool:
        """Whether the sampler supports this number of steps."""
        return 1 <= steps <= self._max_steps or steps == self.steps

    @property
    def max_values(self) -> int:
        """Number of values in all inputs for one image with the most steps."""
        values = math.prod(self.shape)
        return values + (max(self._max_steps, self.steps) * values if self.stochastic else 0)

    @property
    def parameters(self) -> dict[str, Any]:
        """What clients need to know besides inputs and outputs. Steps are 1 to `max_steps`, or `steps`."""
        return {
            "classes": self.classes,
            "steps": self.steps,
            "max_steps": self._max_steps,
            "guidance": self.guidance,
            "provider": self.provider,
            "device": self.device,
            "threads": self.threads.number,
        }

    @property
    def steps_allowed(self) -> str:
        more = f", or {self.steps}" if self.steps > self._max_steps else ""
        return f"1 to {self._max_steps}{more}"

    def evaluations(self, steps: int) -> int:
        """Number of network evaluations that an allowed number of steps takes."""
        return int(self._loop.lengths[steps])

    def run(self, feeds: Feeds, span: Span, options: ort.RunOptions | None = None) -> Feeds:
        """Run some network evaluations, on `noise` or the `state` after those before, and the other inputs.

        Returns the outputs after the last evaluation, else the `state`, float32 (3, B, C, H, W). Setting
        `options.terminate` ends the run with an error.
        """
        given = {name: value for name, value in feeds.items() if name in ("y", "guidance", "steps_noise")}
        given[loop.STATE] = feeds["state"] if "state" in feeds else np.stack([feeds["noise"]] * 3)
        given[loop.BEGIN] = self._loop.begins[[span.steps]] + span.first
        given[loop.COUNT] = np.array(span.last - span.first)
        if self._pool and (parts := min(self.threads.number, given[loop.STATE].shape[1])) > 1:
            axes = {name: axis for name, axis in AXES.items() if name in given}
            split = {name: np.array_split(given[name], parts, axis) for name, axis in axes.items()}
            shares = [given | {name: split[name][part] for name in axes} for part in range(parts)]
            state = np.concatenate(list(self._pool.map(self._run, shares, [options] * parts)), axis=1)
        else:
            state = self._run(given, options)
        if span.last < self.evaluations(span.steps):
            return {"state": state}
        return {"images": to_uint8(state[0]), "x_0": state[0]}

    def _run(self, given: Feeds, options: ort.RunOptions | None) -> NDArray[np.float32]:
        """Run the loop; returns the state."""
        binding = self.session.io_binding()
        for name, value in given.items():
            array = np.asarray(value, order="C")
            if self._places[name] == "cpu":
                binding.bind_cpu_input(name, array)
            else:
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self._places[name]))
        binding.bind_output(loop.STATES)  # in the memory of the CPU
        self.session.run_with_iobinding(binding, options)
        (state,) = (output.numpy() for output in binding.get_outputs())
        return state


def to_uint8(x_0: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert clean images (B, C, H, W) to uint8 (B, H, W, C), as the graph does."""
    in_range = (np.clip(x_0, -1, 1) + np.float32(1)) * np.float32(127.5)
    return np.ascontiguousarray(np.rint(in_range).astype(np.uint8).transpose(0, 2, 3, 1))


def _tensors(values: list[ort.NodeArg]) -> dict[str, Tensor]:
    return {
        value.name: Tensor(
            DATATYPES.get(value.type, value.type), tuple(s if isinstance(s, int) else -1 for s in value.shape)
        )
        for value in values
    }
