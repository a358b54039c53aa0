"""Speed of a model's graphs of different precision in ONNX Runtime on this machine."""

import time
from statistics import median

import onnxruntime as ort

from diffusion.export import golden

BATCHES = (1, 64)
REPEATS = 5
PAUSE_SECONDS = 0.1
"""Time after which a session's threads stop busy-waiting, so that they do not slow down the next session."""


def measure(denoisers: dict[str, ort.InferenceSession]) -> dict[str, dict[str, float]]:
    """Measure the milliseconds of a denoiser run, `ms_at_B`, for each batch size B: the median of several repeats."""
    facts = next(iter(denoisers.values())).get_modelmeta().custom_metadata_map
    found: dict[str, dict[str, float]] = {name: {} for name in denoisers}
    for batch in BATCHES:
        durations: dict[str, list[float]] = {name: [] for name in denoisers}
        for _ in range(REPEATS):
            for name, session in denoisers.items():
                feed = golden.inputs(golden.names(session), facts, golden.SEED, batch)
                time.sleep(PAUSE_SECONDS)
                session.run(["eps_hat"], feed)  # warm-up, which wakes the threads
                began = time.perf_counter()
                session.run(["eps_hat"], feed)
                durations[name].append(1000 * (time.perf_counter() - began))
        for name, times in durations.items():
            found[name][f"ms_at_{batch}"] = median(times)
    return found
