"""Denoising diffusion models: training, sampling, evaluation and export.

The public names are imported lazily, so that programs that do not need PyTorch do not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.model import Model as Model
    from diffusion.nn.unet import UNetOptions as UNetOptions
    from diffusion.nn.uvit import UViTOptions as UViTOptions
    from diffusion.pairs.memory import Images as Images
    from diffusion.pairs.memory import load_images as load_images
    from diffusion.process.build import Process as Process
    from diffusion.process.build import ProcessOptions as ProcessOptions
    from diffusion.samples import save_grid as save_grid
    from diffusion.sampling.build import SampleOptions as SampleOptions
    from diffusion.training.fit import fit as fit
    from diffusion.training.options import TrainOptions as TrainOptions

_PLACES = {
    "Images": "pairs.memory",
    "Model": "model",
    "Process": "process.build",
    "ProcessOptions": "process.build",
    "SampleOptions": "sampling.build",
    "TrainOptions": "training.options",
    "UNetOptions": "nn.unet",
    "UViTOptions": "nn.uvit",
    "fit": "training.fit",
    "load_images": "pairs.memory",
    "save_grid": "samples",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
