"""How fast models/onnx/sampler.onnx and its variants make pictures, beside the same weights in torch and in diffusers.

Run it in a tree with a trained and exported model that diffusers has a counterpart for (`ddpm export-diffusers`):

    python benchmarks/onnx_sampling.py

All take turns, in batches of 1 and of 64, so that all see the machine fast and slow alike; the median of the turns
counts. Before each turn the threads of whoever went before are left to go to sleep, and a call that does not count
wakes one's own. The same weights in torch go through the project's own sampler, as they are and with the network
through torch.compile; in diffusers through its DDIMPipeline, with the sampler's number of steps and with 50. Quality is
the Fréchet distance of --count pictures, by a classifier trained on the same data.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import features
import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.exchange.diffusers import export_model
from diffusion.export import parity, speed
from diffusion.model import Model, load_model
from diffusion.pairs.pixels import to_uint8
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import sample
from flows import params as parameters
from flows.paths import Paths

diffusers: Any = importlib.import_module("diffusers")  # it has no types
MANY_STEPS = 50
Images = NDArray[np.uint8]
Make = Callable[[int, int], Images]
"""(number of pictures, seed) to pictures (N, C, H, W)."""


def with_onnx(path: Path) -> Make:
    session = parity.session(path.read_bytes(), torch.device("cpu"))
    shape = session.get_inputs()[0].shape[1:]
    if [value.name for value in session.get_inputs()] != ["noise", "steps"]:
        sys.exit("models/onnx/sampler.onnx: the benchmark is for deterministic samplers and networks without classes")

    def make(count: int, seed: int) -> Images:
        noise = np.random.default_rng(seed).standard_normal((count, *shape), np.float32)
        images = session.run(["images"], {"noise": noise, "steps": np.array([0])})[0]
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    return make


def with_torch(model: Model, options: SampleOptions) -> Make:
    timesteps = sampling.sampling_timesteps(options, model.process.schedule)

    def make(count: int, seed: int) -> Images:
        noise = np.random.default_rng(seed).standard_normal((count, *model.shape), np.float32)
        x_t = torch.from_numpy(noise).to(memory_format=torch.channels_last)
        return to_uint8(sample(model.sampler(options), lambda _: x_t, timesteps).numpy())

    return make


def with_diffusers(directory: Path, steps: int) -> Make:
    diffusers.utils.logging.disable_progress_bar()
    trained = diffusers.DDPMPipeline.from_pretrained(directory)
    scheduler = diffusers.DDIMScheduler.from_config(trained.scheduler.config)
    pipeline = diffusers.DDIMPipeline(unet=trained.unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def make(count: int, seed: int) -> Images:
        generator = torch.Generator().manual_seed(seed)
        made = pipeline(batch_size=count, generator=generator, num_inference_steps=steps, output_type="np").images
        return np.ascontiguousarray((made * 255).round().astype(np.uint8).transpose(0, 3, 1, 2))

    return make


def seconds(makers: dict[str, Make], batch: int, turns: int) -> dict[str, float]:
    """Median seconds of a call; those of the first turn, which compile and allocate, do not count."""
    taken: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(turns + 1):
        for name, make in makers.items():
            time.sleep(speed.PAUSE_SECONDS)
            make(1, turn)
            began = time.perf_counter()
            make(batch, turn)
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(), help="working tree with params.yaml, data and models")
    parser.add_argument("--turns", type=int, default=9, help="calls of each, for each size of batch")
    parser.add_argument("--count", type=int, default=512, help="pictures for the Fréchet distance")
    arguments = parser.parse_args()

    paths = Paths(arguments.tree)
    params = parameters.load(paths.params)
    export = params.export
    settings = {"sampler": export.sampler, "steps": export.steps, "spacing": export.spacing}
    options = params.sample.model_copy(update=settings)
    model = load_model(paths.model, torch.device("cpu"))
    model.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compiled = replace(model, net=cast("torch.nn.Module", torch.compile(model.net)))
    with tempfile.TemporaryDirectory() as temporary:
        exchanged = Path(temporary) / "diffusers"
        export_model(paths.model, exchanged, params.sample.model_copy(update={"threshold": "clip"}), force=False)
        makers = {
            **{path.name: with_onnx(path) for path in sorted(paths.onnx.glob("sampler*.onnx"))},
            "torch": with_torch(model, options),
            "torch.compile": with_torch(compiled, options),
            f"DDIMPipeline, {export.steps} steps": with_diffusers(exchanged, export.steps),
            f"DDIMPipeline, {MANY_STEPS} steps": with_diffusers(exchanged, MANY_STEPS),
        }
    taken = {batch: seconds(makers, batch, arguments.turns) for batch in speed.BATCHES}

    judge = features.train_judge(paths)
    distances = {}
    for name in (name for name in makers if not name.startswith("torch")):
        parts = [makers[name](64, seed) for seed in range(-(-arguments.count // 64))]
        distances[name] = judge.distance(np.concatenate(parts)[: arguments.count])
    print("| | ms, a picture alone | images/s, batch of 64 | Fréchet |\n|---|---|---|---|")
    for name in makers:
        quality = f"{distances[name]:.2f}" if name in distances else ""
        print(f"| {name} | {1000 * taken[1][name]:.1f} | {64 / taken[64][name]:.0f} | {quality} |")
    print(json.dumps({"benchmark": "onnx_sampling", "seconds": taken, "frechet": distances}))


if __name__ == "__main__":
    main()
