"""The loss curve: what its points are means of."""

import pytest
import torch

from diffusion.training import curves
from diffusion.training.distributed import World
from flows.params import Params
from tests.training.test_loop import changed, fresh_state


@pytest.fixture
def params(params: Params) -> Params:
    return changed(params, network={"base_channels": 8, "channel_multipliers": [1], "attention_levels": []})


def test_a_point_is_the_mean_over_the_steps_since_the_last_one(params: Params) -> None:
    state = fresh_state(params)
    steps = [
        ([1.0, 2.0], 3.0, [0, 99], [1.0, 0.5]),  # loss of each image, norm of the gradient, t, weight
        ([4.0, 6.0], 5.0, [5, 20], [2.0, 1.0]),
    ]
    for loss, norm, t, weight in steps:
        curves.accumulate(state, torch.tensor(loss), torch.tensor(norm), torch.tensor(t), torch.tensor(weight), 100)
    state.step = 2
    point = curves.add_point(state, World(), 0.1, 100)
    assert point == {
        "step": 2,
        "learning_rate": 0.1,
        "grad_norm": 4.0,
        "loss": (1.0 + 7.0) / 2,  # of the weighted means (1 + 0.5 * 2) / 2 and (2 * 4 + 6) / 2
        "loss_t00_09": (1 + 2 * 4) / 3,  # in a band the weights sum to one
        "loss_t20_29": 6.0,
        "loss_t90_99": 2.0,
    }
    assert state.loss_curve == [point]
    assert curves.add_point(state, World(), 0.1, 100) is None  # no step since
    assert state.loss_curve == [point]


def test_patience_ends_after_that_many_measurements_without_improvement() -> None:
    def out(errors: list[float], patience: int) -> bool:
        rows = [{"step": step, "mse": error} for step, error in enumerate(errors)]
        return curves.out_of_patience(rows, patience)

    assert not out([], 1)
    assert not out([3, 2, 2.5, 2.1], 3)
    assert out([3, 2, 2.5, 2.1, 2.2], 3)
    assert out([3, 2, 2], 1)  # as good is not better
    assert not out([3, 2, 2.5, 2.1, 2.2], 0)


def test_skipped_steps_are_counted_in_all_in_a_row_and_in_the_longest_row(params: Params) -> None:
    state, seen = fresh_state(params), list[list[int]]()
    one = torch.ones(1)
    for norm in (1.0, torch.nan, torch.inf, 2.0, torch.nan, 3.0):
        curves.accumulate(state, one * norm, torch.tensor(norm), torch.zeros(1, dtype=torch.int64), one, 100)
        seen.append(state.skips.tolist())
    assert seen == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 0, 2], [3, 1, 2], [3, 0, 2]]
    assert (state.skipped, state.skipped_in_row, state.longest_skip) == (3, 0, 2)
    assert state.sums[:3].tolist() == [3, 6, 6]  # steps, losses, norms of those that were taken
