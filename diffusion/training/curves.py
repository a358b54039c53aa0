"""Training curves: the loss, overall and by band of t, and the held-out error."""

from itertools import pairwise

import torch
from torch import Tensor

from diffusion.process.bands import BANDS, band_edges, band_of
from diffusion.training.distributed import World
from diffusion.training.state import Row, State


def accumulate(state: State, loss: Tensor, norm: Tensor, t: Tensor, weight: Tensor, num_timesteps: int) -> None:
    """Add a step to the running sums: loss and weight (B,) and t int64 (B,) of its images, and the gradient norm.

    A step with a non-finite gradient norm is counted as skipped and not added.
    """
    loss, norm = loss.to(state.sums.device), norm.to(state.sums.device)
    finite = norm.isfinite()
    total, in_row, _ = state.skips + ~finite
    in_row = torch.where(finite, 0, in_row)
    state.skips = torch.stack([total, in_row, torch.maximum(state.skips[2], in_row)])
    bands = torch.arange(BANDS, device=t.device)
    band = (band_of(t, num_timesteps)[:, None] == bands).double()
    weight = weight.double()
    weighted = weight * loss.double()
    step = torch.stack([torch.ones_like(norm), weighted.mean(), norm])
    added = torch.cat([step, weighted @ band, weight @ band])
    state.sums += torch.where(finite, added, 0)


def add_point(state: State, world: World, learning_rate: float, num_timesteps: int) -> Row | None:
    """Append the means since the last point to the loss curve; returns None if all steps since were skipped.

    A collective call. A band of t without timesteps has no value.
    """
    world.sum_(state.sums)
    steps, loss, norm, *bands = state.sums.tolist()
    state.sums.zero_()
    if not steps:
        return None
    row = {
        "step": state.step,
        "loss": loss / steps,
        "learning_rate": learning_rate,
        "grad_norm": norm / steps,
    }
    names = band_columns(num_timesteps)
    for name, total, weight in zip(names, bands[:BANDS], bands[BANDS:], strict=True):
        if weight:
            row[name] = total / weight
    state.loss_curve.append(row)
    return row


def band_columns(num_timesteps: int) -> list[str]:
    """Column names of the losses by band of t, such as loss_t000_099."""
    digits = len(str(num_timesteps - 1))
    return [f"loss_t{first:0{digits}d}_{after - 1:0{digits}d}" for first, after in pairwise(band_edges(num_timesteps))]


def best(heldout_curve: list[Row]) -> Row:
    """The held-out measurement with the lowest error."""
    return min(heldout_curve, key=lambda row: row["mse"])


def out_of_patience(heldout_curve: list[Row], patience: int) -> bool:
    """Whether the last `patience` measurements brought no improvement; never if `patience` is 0."""
    if not patience or not heldout_curve:
        return False
    return len(heldout_curve) - 1 - heldout_curve.index(best(heldout_curve)) >= patience
