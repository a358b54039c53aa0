"""Points along the teacher's trajectories, and steps along them, against closed forms."""

import math
from bisect import bisect_right
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.distillation.teacher import follow, waypoints
from diffusion.process.denoiser import Denoiser
from diffusion.process.schedule import Schedule
from diffusion.sampling.sampler import Ddim, DpmSolver, Previous, Sampler
from tests.distillation.gaussian import carried, process, teacher
from tests.process.fakes import at, randn

EVEN = [math.cos((t + 1) / 8 * 0.99 * math.pi / 2) ** 2 for t in range(8)]
"""alpha_bar with the same angle between neighbours."""
GIVEN: dict[str, list[float]] = {
    "fast": [0.1, 0.5, 0.9],
    "slow": [1e-3, 2e-3, 4e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.6],
    "even": [1 - b / a for a, b in pairwise([1.0, *EVEN])],
}
MADE: list[dict[str, Any]] = [
    *({"schedule": name, "num_timesteps": 1000} for name in ("linear", "scaled-linear", "cosine", "sigmoid")),
    *({"schedule": name, "num_timesteps": T} for name in ("cosine", "sigmoid") for T in (3, 10)),
    *({"schedule": "cosine", "num_timesteps": T, "zero_terminal_snr": True} for T in (3, 10, 1000)),
    {"schedule": "linear", "num_timesteps": 1000, "zero_terminal_snr": True},
    *({"schedule": {"kind": "given", "beta": beta}, "num_timesteps": len(beta)} for beta in GIVEN.values()),
]


def angles(schedule: Schedule) -> list[float]:
    """The angle at each timestep, with the arc cosine, or near 0, where that loses digits, the arc sine."""
    values = schedule.alpha_bar.tolist()
    return [math.acos(math.sqrt(a)) if a < 0.5 else math.asin(math.sqrt(1 - a)) for a in values]


@pytest.mark.parametrize("points", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("changes", MADE, ids=str)
def test_waypoints_are_even_in_the_angle_and_end_at_the_image(changes: dict[str, Any], points: int) -> None:
    schedule = process(**changes).schedule
    phi = angles(schedule)
    t = torch.arange(schedule.num_timesteps)
    path = waypoints(schedule, t, points, points)
    assert [(s.dtype, s.shape) for s in path] == [(torch.int64, t.shape)] * points
    for image in range(0, len(t), 7 if len(t) > 100 else 1):
        own = [int(s[image]) for s in path]
        steps = max(math.ceil(phi[image] / phi[-1] * points - 1e-9), 1)
        before = image
        for number, s in enumerate(own, start=1):
            if number >= steps or before <= 0:
                assert s == -1
            else:  # the last timestep at most as noisy as wanted, but an earlier one than the last in any case
                assert s == min(bisect_right(phi, phi[image] * (1 - number / steps) + 1e-9), before) - 1
            before = s
        assert own[-1] == -1


def test_waypoints_of_a_schedule_even_in_the_angle_are_its_own_timesteps() -> None:
    """Although rounding puts some of the wanted angles just below those of the timesteps."""
    schedule = process(schedule={"kind": "given", "beta": GIVEN["even"]}, num_timesteps=8).schedule
    for points, expected in ((8, [6, 5, 4, 3, 2, 1, 0, -1]), (4, [5, 3, 1, -1]), (2, [3, -1]), (1, [-1])):
        for t in (7, 3):
            count = points * (t + 1) // 8 or 1
            path = [int(s) for s in waypoints(schedule, torch.tensor([t]), points, count)]
            assert path == expected[-count:]


def test_waypoints_of_one_image_do_not_depend_on_the_others() -> None:
    schedule = process().schedule
    t = torch.tensor([999, 0, 500, 20])
    together = torch.stack(waypoints(schedule, t, 8, 5))
    for image in range(4):
        assert torch.stack(waypoints(schedule, t[image : image + 1], 8, 5)).flatten().equal(together[:, image])


def sampler(kind: str, denoiser: Denoiser) -> Sampler:
    return Ddim(denoiser, eta=0) if kind == "ddim" else DpmSolver(denoiser, stochastic=False)


@pytest.mark.parametrize("changes", [{}, {"schedule": "linear"}, {"zero_terminal_snr": True}], ids=str)
@pytest.mark.parametrize(("kind", "order"), [("ddim", 1), ("dpm-solver++", 2)])
def test_steps_of_the_teacher_converge_to_the_exact_trajectory(
    kind: str, order: int, changes: dict[str, object]
) -> None:
    """From the middle of the way to a quarter; the same number of steps for all images of a batch."""
    made = process(num_timesteps=20_000, **changes)
    x_t, schedule = randn(3, 1, 2, 2), made.schedule
    half = schedule.angle(torch.tensor([19_999])).flatten() / 2
    t = schedule.at_angle(half * torch.tensor([1.0, 0.99, 0.98]))
    errors = []
    for steps in (20, 40, 80):  # to half of the angle of t
        path = waypoints(schedule, t, 4 * steps, steps)
        x_s, s = follow(sampler(kind, teacher(made).denoiser(None)), x_t, t, path)
        assert s.equal(path[-1])
        errors.append((x_s - carried(made, x_t, t, s)).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)
    assert errors[-1] < (4e-3 if order == 1 else 2e-4)


@pytest.mark.parametrize("kind", ["ddim", "dpm-solver++"])
def test_all_the_way_to_the_image(kind: str) -> None:
    """Also from pure noise; an image that has arrived stays, whatever the others do."""
    made = process(zero_terminal_snr=True)
    x_t, t = randn(4, 1, 2, 2), torch.tensor([999, 700, 30, 0])
    path = waypoints(made.schedule, t, 400, 400)
    x_s, s = follow(sampler(kind, teacher(made).denoiser(None)), x_t, t, path)
    assert s.tolist() == [-1] * 4
    torch.testing.assert_close(x_s, carried(made, x_t, t, s), atol=0.01 if kind == "ddim" else 2e-3, rtol=0)
    for image in range(4):
        alone, _ = follow(
            sampler(kind, teacher(made).denoiser(None)),
            x_t[image : image + 1],
            t[image : image + 1],
            [each[image : image + 1] for each in path],
        )
        torch.testing.assert_close(alone, x_s[image : image + 1])


def test_each_step_begins_where_the_last_ended() -> None:
    """The timesteps and the previous step that the sampler is given."""
    seen: list[tuple[list[int], list[int], list[int] | None]] = []

    class Records:
        def step(
            self, x_t: Tensor, t: Tensor, s: Tensor, _: object, previous: Previous | None
        ) -> tuple[Tensor, Tensor]:
            seen.append((t.tolist(), s.tolist(), previous.t.tolist() if previous else None))
            return x_t + 1, x_t

    x_t, path = torch.zeros(2, 1, 1, 1, requires_grad=True), [torch.tensor([7, -1]), torch.tensor([3, -1])]
    x_s, s = follow(Records(), x_t, torch.tensor([9, 2]), path)
    assert seen == [([9, 2], [7, -1], None), ([7, 0], [3, -1], [9, 2])]
    assert x_s.flatten().tolist() == [2.0, 1.0]
    assert s.tolist() == [3, -1]
    assert not x_s.requires_grad


@pytest.mark.parametrize("changes", MADE, ids=str)
def test_angle_and_at_angle_are_inverse(changes: dict[str, Any]) -> None:
    schedule = process(**changes).schedule
    t = torch.arange(schedule.num_timesteps)
    angle = schedule.angle(t)
    assert angle.shape == (len(t), 1, 1, 1)
    torch.testing.assert_close(angle.cos().square(), at(schedule, t), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(angle.flatten(), torch.tensor(angles(schedule), dtype=torch.float64))
    assert schedule.angle(torch.tensor([-1])).item() == 0
    angle = angle.flatten()
    assert schedule.at_angle(angle).equal(t)
    assert schedule.at_angle(angle * (1 - 1e-9)).equal(t - 1)
    assert schedule.at_angle(torch.tensor([0.0, 4.0], dtype=torch.float64)).tolist() == [-1, len(t) - 1]
