"""The golden test embedded in an ONNX file: reproducible inputs and the expected output.

It only needs NumPy and ONNX Runtime; deploy/ONNX.md describes it in words.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

SEED, BATCH = 0, 2
LISTED = 256
"""Number of output values in the file, besides the digest of all, since rounding differs between machines."""
TOLERANCES = {"images": 1.0, "eps_hat": 1e-3}
"""Tolerance of a listed value: in grey levels (of 255), or in standard deviations of the noise."""
SHARE = 0.99
"""Fraction of the listed values that must be within the tolerance."""


class Outcome(NamedTuple):
    """Result of a golden test."""

    exact: bool
    """Whether the output is bit-identical to the one on the exporting machine."""
    largest: float
    """Largest difference among the listed values."""


def normal(seed: int, number: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise from NumPy's Philox with the key (seed, number)."""
    key = np.array([seed, number], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def inputs(names: Iterable[str], facts: Mapping[str, str], seed: int, batch: int) -> dict[str, NDArray[Any]]:
    """Inputs for a graph, by name."""
    shape = (batch, *(int(facts[f"ddpm.{side}"]) for side in ("channels", "height", "width")))
    makers: dict[str, Callable[[], NDArray[Any]]] = {
        "x_t": lambda: normal(seed, 0, shape),
        "noise": lambda: normal(seed, 0, shape),
        "steps_noise": lambda: normal(seed, 1, (int(facts["ddpm.steps"]), *shape)),
        "t": lambda: np.linspace(0, int(facts["ddpm.num_timesteps"]) - 1, batch).astype(np.int64),
        "steps": lambda: np.array([int(facts["ddpm.steps"])]),
        "guidance": lambda: np.array([float(facts["ddpm.guidance"])], np.float32),
        "y": lambda: np.arange(batch) % len(json.loads(facts["ddpm.classes"])),
    }
    return {name: makers[name]() for name in names}


def names(session: ort.InferenceSession) -> list[str]:
    """Names of a graph's inputs."""
    return [value.name for value in session.get_inputs()]


def record(session: ort.InferenceSession, facts: Mapping[str, str]) -> str:
    """Run the graph on this machine and return the test as JSON for `ddpm.golden`."""
    name = session.get_outputs()[0].name
    output = session.run([name], inputs(names(session), facts, SEED, BATCH))[0]
    return json.dumps(
        {
            "seed": SEED,
            "batch": BATCH,
            "output": name,
            "sha256": _digest(output),
            "every": _every(output),
            "values": [round(float(value), 6) for value in output.reshape(-1)[:: _every(output)]],
            "tolerance": TOLERANCES[name],
            "share": SHARE,
        }
    )


def check(session: ort.InferenceSession, facts: Mapping[str, str]) -> Outcome:
    """Run the golden test of a file; raises ValueError, in one line, if it has none or fails."""
    try:
        test = json.loads(facts["ddpm.golden"])
        alpha_bar, digest = np.array(json.loads(facts["ddpm.alpha_bar"]), "<f8"), facts["ddpm.alpha_bar_sha256"]
        given = inputs(names(session), facts, test["seed"], test["batch"])
        output = session.run([test["output"]], given)[0]
        found, expected = output.reshape(-1)[:: test["every"]].astype(np.float64), np.array(test["values"])
        tolerance, share, sha256 = float(test["tolerance"]), float(test["share"]), test["sha256"]
    except Exception as error:  # the file may contain anything, and ONNX Runtime's errors have no common base class
        raise ValueError(
            f"has no golden test that can be run ({brief(error)}): modified, or not exported by this library"
        ) from None
    if _digest(alpha_bar) != digest:
        raise ValueError("ddpm.alpha_bar does not match ddpm.alpha_bar_sha256: the file was modified")
    if found.shape != expected.shape:
        raise ValueError(f"{test['output']} has {found.size} listed values, not {expected.size}: the file was modified")
    off = np.abs(found - expected)
    if not (off <= tolerance).mean() >= share:
        raise ValueError(
            f"golden test failed: {test['output']} differs by up to {off.max():.3g} (allowed: {tolerance:g} in all but "
            f"{1 - share:.0%} of the values); the file is damaged, or ONNX Runtime computes wrong results"
        )
    return Outcome(_digest(output) == sha256, float(off.max()))


def brief(error: Exception) -> str:
    """First line of an error's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _every(output: NDArray[Any]) -> int:
    return max(1, output.size // LISTED)
