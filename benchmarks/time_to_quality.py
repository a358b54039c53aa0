"""How soon this project reaches the held-out error of diffusers' training example, on the same data and machine.

Run it in a tree where `ddpm shard` and `ddpm pairs` have written data/pairs of the preset:

    python benchmarks/time_to_quality.py --preset presets/fashion-mnist.yaml --out docs/time-to-quality

Three trainings take turns, in slices of some seconds, so that fluctuations of the machine affect all equally: the
preset; the preset with a tenth of its steps; and diffusers' training example (UNet2DModel, DDPMScheduler, EMA, warm-up,
constant or cosine learning rate), for 28x28 greyscale images, for as long as the preset takes. The cosine decay of the
example suits so short a training less.
Only training counts as time. The error is the MSE of the predicted noise on 1,024 test pairs, of the raw or the
averaged weights, whichever is lower. diffusers trains on all training images, as the preset does.
"""

import argparse
import csv
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from frechet import Frechet, Images
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from diffusion.evaluation import sets
from diffusion.evaluation.charts import decimal_ticks
from diffusion.model import Config, Model, new_network
from diffusion.nn.counting import count
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.pairs.pixels import to_x_0
from diffusion.process import build
from diffusion.samples import draw_samples, grid_png
from diffusion.sampling.build import SampleOptions
from diffusion.training import loop
from diffusion.training.distributed import World
from diffusion.training.hardware import prefetched, runnable, should_compile
from diffusion.training.state import new_state
from flows import presets
from flows.params import Params
from flows.paths import Paths

MARKS = (1 / 40, 1 / 20, 1 / 10, 1 / 5, 2 / 5, 7 / 10, 1.0)
"""Fractions of a training at which its error is measured."""
BLOCKS = 16
"""Blocks of 64 test pairs."""
TICKS = {"1 s": 1, "3 s": 3, "10 s": 10, "30 s": 30, "1 min": 60, "3 min": 180, "10 min": 600, "30 min": 1800}
"""Ticks of the time axis, in seconds."""
Row = dict[str, Any]
UNet: Any = UNet2DModel  # diffusers has no types


class Training(ABC):
    """A training that takes turns with others."""

    name: str

    def __init__(self) -> None:
        self.seconds, self.images, self.rows = 0.0, 0, list[Row]()

    @abstractmethod
    def step(self) -> int:
        """Train on a batch; returns its number of images."""

    @abstractmethod
    def share(self) -> float:
        """Fraction of the training that is done."""

    def done(self) -> bool:
        return self.share() >= 1

    @abstractmethod
    def nets(self) -> dict[str, torch.nn.Module]:
        """The network with raw and with averaged weights, each returning eps_hat for (x_t, t)."""

    def slice(self, seconds: float, test: Pairs) -> None:
        """Train for `seconds`, measuring at each mark passed."""
        until = self.seconds + seconds
        while self.seconds < until and not self.done():
            began = time.perf_counter()
            self.images += self.step()
            self.seconds += time.perf_counter() - began
            if self.share() >= MARKS[len(self.rows)] and not self.done():
                self.measure(test)
        if self.done():
            self.measure(test)

    def measure(self, test: Pairs) -> None:
        errors = {name: heldout_mse(net, test) for name, net in self.nets().items()}
        self.rows.append({"training": self.name, "seconds": self.seconds, "images": self.images} | errors)
        row = ", ".join(f"{name} {value:.4f}" for name, value in errors.items())
        print(f"{self.name}: {self.seconds:.0f} s, {self.images} images: {row}", file=sys.stderr, flush=True)

    def best(self) -> list[tuple[float, float]]:
        """Seconds and error, of the better weights, at each mark."""
        return [(row["seconds"], min(row["raw"], row["average"])) for row in self.rows]


class PresetTraining(Training):
    """A preset, trained by the step of the stage `train`, with prefetched batches."""

    def __init__(self, name: str, params: Params, pairs: Pairs) -> None:
        super().__init__()
        self.name, self.params = name, params
        self.process = build.process(params.process)
        torch.manual_seed(params.seed)
        net = new_network(pairs.shape, len(pairs.manifest.classes), params.network, params.process)
        self.state = new_state(net, params.train, self.process.schedule)
        options = params.train
        fetch = Batches(pairs, params.seed, options.batch_size, options.flip)
        device = next(net.parameters()).device
        compiling = should_compile(options, device, lambda: count(net, pairs.shape).flops)
        self.trainer = loop.Trainer(
            options,
            params.seed,
            self.process.loss,
            prefetched(fetch, device),
            runnable(net, options, World(), compiling),
        )
        self.config = Config(
            shape=pairs.shape, classes=(), network=params.network, process=params.process, x_0_mse=None
        )

    def step(self) -> int:
        loop.step(self.state, self.trainer)
        return self.params.train.batch_size

    def share(self) -> float:
        return self.state.step / self.params.train.steps

    def nets(self) -> dict[str, torch.nn.Module]:
        return {"raw": self.eps_of(self.state.net), "average": self.eps_of(self.state.average)}

    def eps_of(self, net: torch.nn.Module) -> torch.nn.Module:
        return EpsOf(Model(net, self.process, self.config))

    def model(self) -> Model:
        return Model(self.state.average, self.process, self.config)


class EpsOf(torch.nn.Module):
    """The noise that a model predicts."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.net, self.parameterization = model.net, model.process.parameterization

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.parameterization.to_eps(self.net(x_t, t), x_t, t)


class Peer(Training):
    """diffusers' unconditional training example, for as long as another training takes."""

    name = "diffusers"
    BATCH, RATE, WARMUP = 64, 4e-4, 100

    def __init__(self, reference: Training, images: Images, params: Params, decay: str) -> None:
        super().__init__()
        self.reference, self.source, self.decay = reference, images, decay
        self.process = build.process(params.process.model_copy(update={"parameterization": "eps"}))
        torch.manual_seed(0)
        self.net = UNet(
            sample_size=images.shape[2],
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=self.RATE, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.average = EMAModel(
            self.net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, model_cls=UNet
        )
        self.generator, self.steps = torch.Generator().manual_seed(0), 0

    def step(self) -> int:
        chosen = torch.randint(len(self.source), (self.BATCH,), generator=self.generator)
        x_0 = torch.from_numpy(to_x_0(self.source[chosen.numpy()], np.float32))
        t = torch.randint(self.process.schedule.num_timesteps, (self.BATCH,), generator=self.generator)
        eps = torch.randn(x_0.shape, generator=self.generator)
        rate = min(1.0, (self.steps + 1) / self.WARMUP)
        if self.decay == "cosine":  # ends with the reference: the time is the same, the number of steps is not
            rate *= 0.5 * (1 + math.cos(math.pi * self.share()))
        self.optimizer.param_groups[0]["lr"] = self.RATE * rate
        loss = F.mse_loss(self.net(self.process.schedule.diffuse(x_0, t, eps), t, return_dict=False)[0], eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.net.parameters())
        self.steps += 1
        return self.BATCH

    def share(self) -> float:
        """Relative to the other training's total time, which is an estimate until it ends."""
        total = self.reference.seconds / max(self.reference.share(), 1e-9)
        share = min(1.0, self.seconds / total) if self.reference.seconds else 0.0
        return share if self.reference.done() else min(share, 0.999)

    def nets(self) -> dict[str, torch.nn.Module]:
        averaged = UNet.from_config(self.net.config)
        self.average.copy_to(averaged.parameters())
        return {"raw": TensorOutput(self.net), "average": TensorOutput(averaged)}

    def model(self, config: Config) -> Model:
        """The averaged weights as a Model; only the shape of `config` is used."""
        return Model(self.nets()["average"], self.process, config)


class TensorOutput(torch.nn.Module):
    """Wraps a diffusers network to return a tensor."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(x_t, t, return_dict=False)[0]
        return out


@torch.inference_mode()
def heldout_mse(net: torch.nn.Module, test: Pairs) -> float:
    training = net.training
    net.eval()
    total, count = 0.0, 0
    for block in range(BLOCKS):
        t, x_t, eps = (torch.from_numpy(array) for array in test.heldout(block, 0))
        error = net(x_t.to(memory_format=torch.channels_last), t) - eps
        total, count = total + error.square().double().sum().item(), count + error.numel()
    net.train(training)
    return total / count


def time_to(curve: list[tuple[float, float]], error: float) -> float | None:
    """Seconds at which a curve reaches an error, interpolated on logarithmic scales; None if it never does."""
    if curve[0][1] <= error:
        return curve[0][0]
    for (before, above), (after, below) in pairwise(curve):
        if below <= error:
            part = math.log(above / error) / math.log(above / below)
            return math.exp(math.log(before) + part * math.log(after / before))
    return None


def plot(trainings: list[Training], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5), dpi=200)
    for training in trainings:
        seconds, errors = zip(*training.best(), strict=True)
        axis.plot(seconds, errors, marker="o", markersize=3, label=training.name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("training time")
    axis.set_ylabel("held-out MSE of the predicted noise")
    limits = axis.get_xlim()
    axis.set_xticks([*TICKS.values()], [*TICKS])
    axis.minorticks_off()
    axis.set_xlim(limits)
    decimal_ticks(axis.yaxis)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), metadata={"Software": None})


def pictures(models: dict[str, Model], distance_of: Frechet, count: int, path: Path) -> dict[str, float]:
    """Plot samples of each model by 20 steps of DDIM from the same noise; returns their Fréchet distances."""
    figure, axes = plt.subplots(1, len(models), figsize=(4 * len(models), 4.3), dpi=100)
    distances = {}
    for axis, (name, model) in zip(axes, models.items(), strict=True):
        model.net.eval()
        options = {"sampler": "ddim", "steps": 20, "spacing": "linspace", "variance": "fixed-small"}
        sample = SampleOptions.model_validate(options | {"threshold": "clip", "guidance": 1.0, "count": 64})
        drawn = [draw_samples(model, sample, 0, torch.device("cpu"), first=first) for first in range(0, count, 64)]
        distances[name] = distance_of(np.concatenate(drawn))
        axis.imshow(plt.imread(BytesIO(grid_png(drawn[0][:49], side=400))), cmap="gray")
        axis.set_title(name)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path.with_name(f"{path.name}-samples.png"), metadata={"Software": None})
    return distances


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(), help="working tree with data/pairs")
    parser.add_argument("--preset", type=Path, required=True, help="parameters of the preset")
    parser.add_argument("--slice", type=float, default=10.0, help="seconds of each turn")
    parser.add_argument("--steps", type=int, help="steps of the preset's training; without it, the preset's own")
    parser.add_argument("--peer-decay", choices=["constant", "cosine"], default="constant", help="of its learning rate")
    parser.add_argument("--count", type=int, default=256, help="samples of each for the Fréchet distance")
    parser.add_argument("--out", type=Path, required=True, help="where to write OUT.csv, OUT.png and OUT-samples.png")
    arguments = parser.parse_args()

    paths = Paths(arguments.tree)
    params = presets.load(arguments.preset)
    pairs, test = Pairs(paths.pairs, "train"), Pairs(paths.pairs, "test")
    steps = arguments.steps or params.train.steps
    short = {"steps": steps // 10, "warmup_steps": min(params.train.warmup_steps, steps // 100)}
    full, tenth = (
        PresetTraining(name, params.model_copy(update={"train": params.train.model_copy(update=changes)}), pairs)
        for name, changes in (("this project", {"steps": steps}), ("this project, a tenth of the steps", short))
    )
    images = sets.chosen([pairs], pairs.images).pixels
    peer = Peer(full, images, params, arguments.peer_decay)
    trainings: list[Training] = [full, tenth, peer]
    while waiting := [training for training in trainings if not training.done()]:
        for training in waiting:
            training.slice(arguments.slice, test)

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for training in trainings for row in training.rows]
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(trainings, arguments.out)
    models = {"diffusers": peer.model(full.config), tenth.name: tenth.model(), full.name: full.model()}
    distances = pictures(models, Frechet(paths, arguments.count), arguments.count, arguments.out)

    reached = {training.name: training.best()[-1][1] for training in trainings}
    facts: Row = {"seconds": peer.seconds, "mse": reached, "frechet": distances}
    for training in (full, tenth):
        seconds = time_to(training.best(), reached["diffusers"])
        facts[f"seconds to diffusers' error, {training.name}"] = seconds
        facts[f"ratio, {training.name}"] = peer.seconds / seconds if seconds else None
    print("| training | seconds | images | images/s | MSE | Fréchet |\n|---|---|---|---|---|---|")
    for training in trainings:
        rate = training.images / training.seconds
        cells = [training.name, f"{training.seconds:.0f}", str(training.images), f"{rate:.0f}"]
        print(f"| {' | '.join(cells)} | {reached[training.name]:.4f} | {distances[training.name]:.1f} |")
    print(json.dumps({"benchmark": "time_to_quality", **facts}))


if __name__ == "__main__":
    main()
