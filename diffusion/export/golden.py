"""The golden test that an ONNX file carries: inputs that anyone can make, and what has to come out.

Nothing but numpy and ONNX Runtime is needed for it; deploy/ONNX.md says in words what stands here.
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
"""So many values of the output are in the file, beside the digest of all: rounding differs between machines."""
TOLERANCES = {"images": 1.0, "eps_hat": 1e-3}
"""How far a listed value may be off; grey levels of 255, or standard deviations of the noise."""
SHARE = 0.99
"""So many of the listed values have to be within the tolerance."""


class Outcome(NamedTuple):
    """What came of a golden test."""

    exact: bool
    """Whether every bit of the output is as it was where the file was made."""
    largest: float
    """Largest difference in the listed values."""


def normal(seed: int, number: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise from numpy's Philox with the key (seed, number)."""
    key = np.array([seed, number], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def inputs(names: Iterable[str], facts: Mapping[str, str], seed: int, batch: int) -> dict[str, NDArray[Any]]:
    """What a graph with inputs of these names is given."""
    shape = (batch, *(int(facts[f"ddpm.{side}"]) for side in ("channels", "height", "width")))
    made: dict[str, Callable[[], NDArray[Any]]] = {
        "x_t": lambda: normal(seed, 0, shape),
        "noise": lambda: normal(seed, 0, shape),
        "steps_noise": lambda: normal(seed, 1, (int(facts["ddpm.steps"]), *shape)),
        "t": lambda: np.linspace(0, int(facts["ddpm.num_timesteps"]) - 1, batch).astype(np.int64),
        "steps": lambda: np.array([int(facts["ddpm.steps"])]),
        "guidance": lambda: np.array([float(facts["ddpm.guidance"])], np.float32),
        "y": lambda: np.arange(batch) % len(json.loads(facts["ddpm.classes"])),
    }
    return {name: made[name]() for name in names}


def names(session: ort.InferenceSession) -> list[str]:
    """Names of a graph's inputs."""
    return [value.name for value in session.get_inputs()]


def record(session: ort.InferenceSession, facts: Mapping[str, str]) -> str:
    """The test as text for `ddpm.golden`, from what the graph gives here."""
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
    """Run the golden test of a file; raises ValueError, in one line, if it carries none or does not pass."""
    try:
        test = json.loads(facts["ddpm.golden"])
        alpha_bar, digest = np.array(json.loads(facts["ddpm.alpha_bar"]), "<f8"), facts["ddpm.alpha_bar_sha256"]
        given = inputs(names(session), facts, test["seed"], test["batch"])
        output = session.run([test["output"]], given)[0]
        found, expected = output.reshape(-1)[:: test["every"]].astype(np.float64), np.array(test["values"])
        tolerance, share, sha256 = float(test["tolerance"]), float(test["share"]), test["sha256"]
    except Exception as error:  # whatever else may be in such a file; ONNX Runtime's errors have nothing in common
        raise ValueError(
            f"carries no golden test that can be run ({brief(error)}): it was changed, or not exported by this library"
        ) from None
    if _digest(alpha_bar) != digest:
        raise ValueError("ddpm.alpha_bar is not what ddpm.alpha_bar_sha256 says: the file was changed")
    if found.shape != expected.shape:
        raise ValueError(f"{test['output']} has {found.size} listed values, not {expected.size}: the file was changed")
    off = np.abs(found - expected)
    if not (off <= tolerance).mean() >= share:
        raise ValueError(
            f"golden test failed: {test['output']} is off by up to {off.max():.3g} (allowed: {tolerance:g} in all but "
            f"{1 - share:.0%} of the values); the file is damaged, or ONNX Runtime computes wrongly"
        )
    return Outcome(_digest(output) == sha256, float(off.max()))


def brief(error: Exception) -> str:
    """The first line of an error, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _every(output: NDArray[Any]) -> int:
    return max(1, output.size // LISTED)
