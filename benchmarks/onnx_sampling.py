"""Sampling speed of models/onnx/sampler.onnx and its variants, and of the same weights in PyTorch and diffusers.

Run it in a working tree with a trained and exported model that diffusers supports (`ddpm export-diffusers`):

    python benchmarks/onnx_sampling.py

All take turns, in batches of 1 and 64, so that fluctuations of the machine affect them equally; the median over the
turns is reported. Before each turn, a pause lets the threads of the previous one go to sleep, and an untimed call wakes
up the next. In PyTorch, the weights are run by the project's own sampler, with and without torch.compile; in diffusers,
by DDIMPipeline, with the same number of steps and with 50. Quality is the Fréchet distance of --count images, in the
features of a network trained on the same data.
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

import numpy as np
import torch
from frechet import Frechet
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
"""(number of images, seed) to images (N, C, H, W)."""


def with_onnx(path: Path) -> Make:
    session = parity.session(path.read_bytes(), torch.device("cpu"))
    shape = session.get_inputs()[0].shape[1:]
    if [value.name for value in session.get_inputs()] != ["noise", "steps"]:
        sys.exit("models/onnx/sampler.onnx: must have a deterministic sampler and a network without classes")

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
    """Median seconds per call, without the first turn, which includes compilation and allocation."""
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
    parser.add_argument("--turns", type=int, default=9, help="calls of each, per batch size")
    parser.add_argument("--count", type=int, default=512, help="images for the Fréchet distance")
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

    distance_of = Frechet(paths, arguments.count)
    distances = {}
    for name in (name for name in makers if not name.startswith("torch")):
        parts = [makers[name](64, seed) for seed in range(-(-arguments.count // 64))]
        distances[name] = distance_of(np.concatenate(parts)[: arguments.count])
    print("| | ms, single image | images/s, batch of 64 | Fréchet |\n|---|---|---|---|")
    for name in makers:
        quality = f"{distances[name]:.2f}" if name in distances else ""
        print(f"| {name} | {1000 * taken[1][name]:.1f} | {64 / taken[64][name]:.0f} | {quality} |")
    print(json.dumps({"benchmark": "onnx_sampling", "seconds": taken, "frechet": distances}))


if __name__ == "__main__":
    main()
