"""How fast ONNX Runtime is here with graphs of one model in more or fewer bits."""

import time
from statistics import median

import onnxruntime as ort

from diffusion.export import golden

BATCHES = (1, 64)
REPEATS = 5
PAUSE_SECONDS = 0.1
"""Seconds after which a session's threads are asleep: they wait for more work without, and take time from others."""


def measure(denoisers: dict[str, ort.InferenceSession]) -> dict[str, dict[str, float]]:
    """Milliseconds of a look (a run of a denoiser), `ms_at_B`, for each size of batch: the median of some turns."""
    facts = next(iter(denoisers.values())).get_modelmeta().custom_metadata_map
    found: dict[str, dict[str, float]] = {name: {} for name in denoisers}
    for batch in BATCHES:
        durations: dict[str, list[float]] = {name: [] for name in denoisers}
        for _ in range(REPEATS):
            for name, session in denoisers.items():
                feed = golden.inputs(golden.names(session), facts, golden.SEED, batch)
                time.sleep(PAUSE_SECONDS)
                session.run(["eps_hat"], feed)  # wakes its threads
                began = time.perf_counter()
                session.run(["eps_hat"], feed)
                durations[name].append(1000 * (time.perf_counter() - began))
        for name, times in durations.items():
            found[name][f"ms_at_{batch}"] = median(times)
    return found
