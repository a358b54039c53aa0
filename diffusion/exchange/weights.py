"""Conversion of weights between the U-Net and diffusers' UNet2DModel: equal tensors under different names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.nn.layers import frequencies
from diffusion.nn.unet import Block, UNet

ENDS: dict[str, tuple[str, ...]] = {
    "conditions.time.layers.0": ("time_embedding.linear_1",),
    "conditions.time.layers.2": ("time_embedding.linear_2",),
    "stem.1": ("conv_in",),
    "head.0": ("conv_norm_out",),
    "head.2": ("conv_out",),
}
"""Names of layers outside the blocks."""
PARTS: dict[str, tuple[str, ...]] = {
    "residual.norm1": ("resnets.{}.norm1",),
    "residual.conv1": ("resnets.{}.conv1",),
    "residual.emb": ("resnets.{}.time_emb_proj",),
    "residual.norm2": ("resnets.{}.norm2",),
    "residual.conv2": ("resnets.{}.conv2",),
    "residual.shortcut": ("resnets.{}.conv_shortcut",),
    "attention.norm": ("attentions.{}.group_norm",),
    "attention.qkv": ("attentions.{}.to_q", "attentions.{}.to_k", "attentions.{}.to_v"),
    "attention.out": ("attentions.{}.to_out.0",),
}
"""Names of a block's layers; diffusers numbers blocks within a level."""
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention layers in diffusers before 2023, and the current ones."""
FREQUENCIES, FIRST_TIME_LAYER = "conditions.time.frequencies", "conditions.time.layers.0.weight"


def freq_shift(net: UNet) -> int:
    """The shift of a network's frequencies."""
    own = net.conditions.time.frequencies
    return 0 if torch.allclose(own, frequencies(len(own), 0)) else 1


def names(net: UNet) -> dict[str, tuple[str, ...]]:
    """Diffusers' name for each weight; three names where queries, keys and values are one tensor here."""
    layers = dict(ENDS)
    blocks = [("middle.0", "mid_block", 0), ("middle.1", "mid_block", 1)]
    for side in ("down", "up"):
        level = index = 0
        for number, module in enumerate(net.get_submodule(side).children()):
            ours, theirs = f"{side}.{number}", f"{side}_blocks.{level}"
            if isinstance(module, Block):
                blocks.append((ours, theirs, index))
                index += 1
            else:
                layers[f"{ours}.conv"] = (f"{theirs}.{side}samplers.0.conv",)
                level, index = level + 1, 0
    for ours, theirs, index in blocks:
        for part, parts in PARTS.items():
            layers[f"{ours}.{part}"] = tuple(f"{theirs}.{name.format(index)}" for name in parts)
    present = net.state_dict().keys()
    return {
        f"{layer}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for layer, theirs in layers.items()
        for kind in ("weight", "bias")
        if f"{layer}.{kind}" in present
    }


def to_diffusers(net: UNet) -> dict[str, Tensor]:
    """Convert to the weights of a UNet2DModel with the same `freq_shift` and `flip_sin_to_cos` false."""
    weights: dict[str, Tensor] = {}
    for ours, theirs in names(net).items():
        tensor = net.get_parameter(ours).detach().cpu()
        if ".attention." in ours:
            tensor = tensor.reshape(tensor.shape[:2])  # diffusers has linear layers instead of 1x1 convolutions
        parts = tensor.chunk(len(theirs))
        weights |= {
            name: part.clone(memory_format=torch.contiguous_format) for name, part in zip(theirs, parts, strict=True)
        }
    return weights


def from_diffusers(weights: Mapping[str, Tensor], net: UNet, freq_shift: int, flip_sin_to_cos: bool) -> None:
    """Load the weights of a UNet2DModel into `net`.

    Raises UserError naming a tensor that is missing, unexpected, not finite or of the wrong shape.
    """
    found = {_new_name(name): tensor for name, tensor in weights.items()}
    state = {FREQUENCIES: frequencies(len(net.conditions.time.frequencies), freq_shift)}
    for ours, theirs in names(net).items():
        shape = net.get_parameter(ours).shape
        part = torch.Size([shape[0] // len(theirs), *(shape[1:2] if ".attention." in ours else shape[1:])])
        for name in theirs:
            if name not in found:
                raise UserError(f"the tensor {name} is missing")
            if found[name].shape != part:
                raise UserError(
                    f"the tensor {name} has shape {tuple(found[name].shape)}, but config.json implies {tuple(part)}"
                )
            if not found[name].isfinite().all():
                raise UserError(f"the tensor {name} contains NaN or infinite values")
        state[ours] = torch.cat([found.pop(name) for name in theirs]).reshape(shape)
    if found:
        raise UserError(f"the tensor {min(found)} is unexpected: config.json implies no such layer")
    if flip_sin_to_cos:  # diffusers then has the cosines first, and this network the sines
        weight = state[FIRST_TIME_LAYER]
        state[FIRST_TIME_LAYER] = weight.roll(weight.shape[1] // 2, dims=1)
    net.load_state_dict(state)


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
