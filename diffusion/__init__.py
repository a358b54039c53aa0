"""Denoising diffusion models: images in, a trained model and pictures out.

What stands here is imported when it is first used: a program that needs no torch does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.data.memory import Images, load_images
    from diffusion.model import Model
    from diffusion.nn.unet import UNetOptions
    from diffusion.nn.uvit import UViTOptions
    from diffusion.process.build import Process, ProcessOptions
    from diffusion.samples import save_grid
    from diffusion.training.fit import fit
    from diffusion.training.options import TrainOptions

_PLACES = {
    "Images": "data.memory",
    "Model": "model",
    "Process": "process.build",
    "ProcessOptions": "process.build",
    "TrainOptions": "training.options",
    "UNetOptions": "nn.unet",
    "UViTOptions": "nn.uvit",
    "fit": "training.fit",
    "load_images": "data.memory",
    "save_grid": "samples",
}
__all__ = [
    "Images",
    "Model",
    "Process",
    "ProcessOptions",
    "TrainOptions",
    "UNetOptions",
    "UViTOptions",
    "fit",
    "load_images",
    "save_grid",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
