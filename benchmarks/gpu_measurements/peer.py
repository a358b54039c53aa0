"""A diffusers network of the same size as that of cifar10, trained and sampled as its users would do it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from diffusion.nn.counting import count
from diffusion.training.hardware import tf32
from gpu_measurements.bench import SHAPES, Bench, random_batch
from gpu_measurements.turns import Contender, Ready


@contextmanager
def settings(device: torch.device, fast: bool) -> Iterator[None]:
    """Use torch's default settings, as diffusers does; `fast` enables cuDNN benchmarking."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, fast
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(device.type == "cuda")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False


def unet(bench: Bench) -> Any:
    """The network that the developers of diffusers published for CIFAR-10, with the dropout of the preset."""
    from diffusers import UNet2DModel

    UNet: Any = UNet2DModel  # diffusers has no types
    channels, height, _ = SHAPES["cifar10"]
    return UNet(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1 if bench.rehearse else 2,
        block_out_channels=(8, 16, 16, 16) if bench.rehearse else (128, 256, 256, 256),
        norm_num_groups=8 if bench.rehearse else 32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        dropout=0.1,
    ).to(bench.device)


def training(bench: Bench, size: int, best: bool) -> Contender:
    """The training loop of diffusers' unconditional example, on batches of `size` images.

    By default it computes in float32, with convolutions in TF32. `best` adds compilation, bfloat16, channels_last,
    fused AdamW and a fused EMA.
    """
    facts = {
        "training": "diffusers, best" if best else "diffusers, example",
        "batch_size": size,
        "precision": "bf16" if best else "tf32",
        "compiled": best,
    }
    return Contender(facts, size, lambda: _ready(bench, size, best))


def _ready(bench: Bench, size: int, best: bool) -> Ready:
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    Scheduler: Any = DDPMScheduler
    net, schedule = unet(bench), Scheduler(num_train_timesteps=1000, beta_schedule="linear")
    counts = count(net, SHAPES["cifar10"])
    if best:
        net = net.to(memory_format=torch.channels_last)
        net.compile(dynamic=False)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=best or None
    )
    rate: Any = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    average: Any = EMAModel(
        net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=best
    )
    x_0 = torch.from_numpy(random_batch(np.random.default_rng(0), size, SHAPES["cifar10"]).x_0)
    images = x_0.pin_memory() if bench.cuda else x_0

    def step() -> None:
        with settings(bench.device, fast=best):
            clean = images.to(bench.device, non_blocking=True)
            clean = clean.to(memory_format=torch.channels_last) if best else clean
            noise = torch.randn_like(clean)
            t = torch.randint(0, 1000, (size,), device=bench.device)
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=best):
                predicted = net(schedule.add_noise(clean, noise, t), t).sample
            F.mse_loss(predicted.float(), noise.float()).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            average.step(net.parameters())

    return Ready(step, counts)


def pipeline(bench: Bench, size: int, steps: int) -> Callable[[], object]:
    """Sample `size` images with diffusers' DDIMPipeline, with matrix products in TF32 on a GPU."""
    from diffusers import DDIMPipeline, DDIMScheduler

    Pipeline: Any = DDIMPipeline
    Scheduler: Any = DDIMScheduler
    made = Pipeline(unet=unet(bench).eval(), scheduler=Scheduler(num_train_timesteps=1000))
    made.set_progress_bar_config(disable=True)

    def draw() -> object:
        with settings(bench.device, fast=False), tf32() if bench.cuda else nullcontext():
            return made(batch_size=size, num_inference_steps=steps, output_type="np").images

    return draw
