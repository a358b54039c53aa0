"""The served model: loaded from a file or MLflow, verified before use, and updated when its alias moves."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploy.service import loop
from deploy.service.work import Feeds, Pace, Span
from diffusion.export import digest, golden, runtime

log = logging.getLogger("ddpm.service")
T = TypeVar("T")
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


class Model:
    """A verified sampler in ONNX Runtime."""

    def __init__(self, content: bytes, version: str | None, device: str = "cpu", threads: int = 0) -> None:
        """Check the digest of a sampler.onnx, load it and run its golden test, which also warms it up.

        Args:
            content: the bytes of the file.
            version: its version; None for the first 12 digits of the weights' digest.
            device: `auto`, `cpu` or `cuda`.
            threads: number of ONNX Runtime threads; 0 for one per core.

        Raises:
            RejectedModel: the file is damaged or not a sampler, its golden test fails, or the device is unavailable.
        """
        try:
            digest.check(content)
        except ValueError as error:
            raise RejectedModel(str(error)) from None
        try:
            ort.set_default_logger_severity(4)  # errors are raised as well
            place = None if device == "cpu" else 0
            session = runtime.session(content, place, threads)
            facts = session.get_modelmeta().custom_metadata_map
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise RejectedModel(f"not an ONNX model that ONNX Runtime can run ({golden.brief(error)})") from None
        if device == "cuda" and session.get_providers()[0] != runtime.CUDA:
            raise RejectedModel(
                "ONNX Runtime finds no CUDA; use --device cpu, or install onnxruntime-gpu and its libraries"
            )
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
        self.version = version or self.weights[:12]
        self.digest = hashlib.sha256(content).hexdigest()  # the same weights can be exported with different settings
        self.shape = self.inputs["noise"].shape[1:]
        self.stochastic = "steps_noise" in self.inputs
        try:
            self._loop = loop.extract(content)
            self.session = runtime.session(self._loop.graph, place, threads)
            self._check_loop(session, golden.inputs(self.inputs, facts, golden.SEED, golden.BATCH))
        except Exception as error:  # likewise
            raise RejectedModel(golden.brief(error)) from None

    def _check_loop(self, whole: ort.InferenceSession, given: Feeds) -> None:
        """Raise ValueError unless the loop makes the images of the whole graph in one step; measure its pace."""
        if self.stochastic:
            given["steps_noise"] = given["steps_noise"][:1]
        else:
            given["steps"] = np.array([1])
        (expected,) = whole.run(["images"], given)
        span = Span(1, 0, self.evaluations(1))
        found = self.run(given, span)["images"]
        began = time.perf_counter()
        self.run(given, span)
        self.pace = Pace((time.perf_counter() - began) / (golden.BATCH * span.last))
        if np.abs(found.astype(int) - expected).max() > 1:  # a GPU may round differently
            raise ValueError("its loop computes other images than the whole graph")

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
        """What clients need to know besides inputs and outputs: classes and defaults; 1 to `max_steps`, or `steps`."""
        return {
            "classes": self.classes,
            "steps": self.steps,
            "max_steps": self._max_steps,
            "guidance": self.guidance,
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
        (state,) = self.session.run([loop.STATES], given, options)
        if span.last < self.evaluations(span.steps):
            return {"state": state}
        return {"images": to_uint8(state[0]), "x_0": state[0]}


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


class Source(Protocol):
    """Where models are loaded from."""

    def version(self) -> str | None:
        """Return the version to serve now; raises ModelError if it cannot be determined."""
        ...

    def read(self, version: str | None) -> bytes:
        """Return the bytes of its sampler.onnx; raises ModelError."""
        ...


class File:
    """A sampler.onnx, read once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def version(self) -> None:
        return None

    def read(self, version: str | None) -> bytes:  # noqa: ARG002 a file has only one version
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ModelError(
                f"cannot read it ({error.strerror}); `ddpm export` writes models/onnx/sampler.onnx"
            ) from None


class Registered:
    """A model in the MLflow registry: models:/NAME/VERSION, or models:/NAME@ALIAS, whose version may change."""

    def __init__(self, uri: str) -> None:
        found = re.fullmatch(r"models:/([^/@]+)(?:/([0-9]+)|@([^/@]+))", uri)
        if not found:
            raise ModelError("must have the form models:/NAME@ALIAS or models:/NAME/VERSION")
        self.name, self._number, self.alias = found.groups()

    def version(self) -> str:
        if self._number:
            return str(self._number)
        return _mlflow(lambda client, _: str(client.get_model_version_by_alias(self.name, self.alias).version))

    def read(self, version: str | None) -> bytes:
        def fetch(_: Any, download: Any) -> bytes:
            with tempfile.TemporaryDirectory(prefix="ddpm-service-") as directory:
                uri = f"models:/{self.name}/{version}/model.onnx"
                return Path(download(artifact_uri=uri, dst_path=directory)).read_bytes()

        return _mlflow(fetch)


def _mlflow(call: Callable[[Any, Any], T]) -> T:
    """Call a function with an MLflow client and the download function; raises ModelError if MLflow fails."""
    try:  # imported here, since serving a file does not need MLflow
        from mlflow import MlflowClient
        from mlflow.artifacts import download_artifacts

        return call(MlflowClient(), download_artifacts)
    except Exception as error:  # from MLflow, its database, HTTP or storage
        # Addresses differ between calls, and the same cause must give the same line.
        line = re.sub(r"<[^<>]* at 0x[0-9a-f]+>:? ?", "", golden.brief(error))
        raise ModelError(f"not available from MLflow ({line})") from None


class Served:
    """`current` is the model in use; `update` replaces it if the source has a new version."""

    def __init__(self, source: Source, load: Callable[[bytes, str | None], Model]) -> None:
        """Load the first model; raises ModelError if that fails."""
        self._source, self._load = source, load
        version = source.version()
        self.current = load(source.read(version), version)
        self.failures = 0
        """Number of failed updates."""
        self._last_error = ""
        self._rejected: dict[str | None, str] = {}
        """Reason by version, as text: an exception would keep the model alive through its traceback."""

    def update(self) -> None:
        """Check the source once. A failure is counted, logged if it is new, and leaves the current model in place."""
        version = None
        try:
            version = self._source.version()
            if version != self.current.version:
                if version in self._rejected:  # do not download it again
                    raise RejectedModel(self._rejected[version])
                self.current = self._load(self._source.read(version), version)
                log.info("now serving version %s (weights %s)", version, self.current.weights[:12])
            self._last_error = ""
        except ModelError as error:
            self.failures += 1
            if isinstance(error, RejectedModel):
                self._rejected[version] = str(error)
            line = f"version {version}: {error}" if version else str(error)
            if line != self._last_error:
                log.error("still serving version %s: %s", self.current.version, line)
            self._last_error = line
        except Exception as error:  # a malformed file must not end the polling
            self.failures += 1
            log.error("still serving version %s: %s", self.current.version, golden.brief(error))

    def follow(self, seconds: float, stop: threading.Event) -> None:
        """Call `update` every `seconds` until `stop` is set."""
        while not stop.wait(seconds):
            self.update()
