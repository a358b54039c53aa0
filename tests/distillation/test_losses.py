"""The losses of distillation against closed forms: what the right student gets, and others by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion.distillation.losses import ConsistencyLoss, Error, ProgressiveLoss
from diffusion.distillation.teacher import Teacher, waypoints
from diffusion.process.build import Process
from diffusion.process.denoiser import THRESHOLDS
from diffusion.process.parameterization import PARAMETERIZATIONS
from diffusion.sampling.sampler import Ddim
from tests.distillation.gaussian import carried, end, model, process, says, shifted, teacher, x_0_hat
from tests.process.fakes import always, at, output, randn, some_x_0_hat

T = torch.tensor([999, 998, 600, 300, 50, 3, 0])
X_0, EPS = 0.15 * randn(len(T), 1, 2, 2) + 0.2, randn(len(T), 1, 2, 2, seed=1)
SMALL = 0.03 * torch.arange(1.0, 8.0, dtype=torch.float64)
"""What the estimates of another student differ by, for each image."""


def small(t: Tensor) -> Tensor:
    """The same, for timesteps among T; 1 for all others."""
    return torch.stack([SMALL[each == T][0] if each in T else SMALL.new_ones(()) for each in t])


def plus(t: Tensor) -> Tensor:
    return 0.1 + 0 * t.double()


def weight(made: Process, t: Tensor = T) -> Tensor:
    """SNR + 1, (B,)."""
    a = at(made.schedule, t).flatten()
    return a / (1 - a) + 1


def consistency(made: Process, points: int, solver_steps: int, taught: Teacher | None = None) -> ConsistencyLoss:
    return ConsistencyLoss(taught or teacher(made), Error(made.parameterization), points, solver_steps)


@pytest.mark.parametrize("name", ["v", "x_0"])
@pytest.mark.parametrize("fraction", [None, 0.3])
def test_the_error_is_weighted_by_snr_plus_1_in_every_parameterization(name: str, fraction: float | None) -> None:
    """In that of v it is the error of the output, also at zero terminal SNR; a learned variance is left out."""
    made = process(zero_terminal_snr=True)
    x_t, estimate, target = randn(7, 1, 2, 2, seed=2), randn(7, 1, 2, 2, seed=3), randn(7, 1, 2, 2, seed=4)
    out = says(made, always(estimate), name, fraction)(x_t, T)
    error = Error(PARAMETERIZATIONS[name](made.schedule))(out, x_t, T, target)
    torch.testing.assert_close(error, weight(made) * (estimate - target).square().mean(dim=(1, 2, 3)))
    of_v = output("v", made.schedule, estimate, x_t, T) - output("v", made.schedule, target, x_t, T)
    torch.testing.assert_close(error, of_v.square().mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-5)


def test_the_pseudo_huber_metric_is_squared_for_small_errors_and_linear_for_large_ones() -> None:
    made = process()
    x_t, target = torch.zeros(7, 1, 2, 2), torch.zeros(7, 1, 2, 2)
    for size, expected in ((1e-3, 1e-6 / (2 * 0.3)), (0.4, 0.2), (100.0, 99.7)):  # 0.4: sqrt(0.16 + 0.09) - 0.3
        estimate = size / weight(made).sqrt().view(-1, 1, 1, 1) * torch.ones_like(x_t)
        error = Error(made.parameterization, huber=0.3)(says(made, always(estimate))(x_t, T), x_t, T, target)
        torch.testing.assert_close(error, torch.full((7,), expected), rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["v", "x_0"])
@pytest.mark.parametrize("changes", [{}, {"schedule": "linear"}, {"zero_terminal_snr": True}], ids=str)
def test_the_ends_of_the_trajectories_are_consistent(changes: dict[str, object], name: str) -> None:
    """The student that knows them has no loss; one that adds d has d^2 (SNR + 1)."""
    made = process(parameterization=name, **changes)
    loss = consistency(made, 300, 300, teacher(made, name=name))
    exact = loss(says(made, end(made), name), X_0, T, EPS)
    torch.testing.assert_close(exact / weight(made), torch.zeros(7, dtype=torch.float64), atol=1e-5, rtol=0)
    other = loss(says(made, shifted(end(made), small), name), X_0, T, EPS)
    assert other.shape == (7,)
    torch.testing.assert_close(other, weight(made) * SMALL.square(), rtol=0.1, atol=1e-4)


def test_the_target_is_the_teachers_image_or_else_the_students_own_estimate() -> None:
    """A student that adds d everywhere agrees with itself, but not with the teacher."""
    made = process()
    loss = consistency(made, 300, 150)(says(made, shifted(end(made), plus)), X_0, T, EPS)
    arrived = waypoints(made.schedule, T, 300, 150)[-1] < 0
    assert arrived.tolist() == [False, False, False, True, True, True, True]
    expected = torch.where(arrived, 0.01 * weight(made), 0)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=1e-5)


def test_the_students_own_estimate_is_clipped_and_at_the_right_timestep() -> None:
    made, t = process(), torch.tensor([999, 800])
    s = waypoints(made.schedule, t, 4, 1)[0]
    assert (s > 0).all()
    for far, clipped in ((3.0, 1.0), (-2.0, -1.0)):
        loss = consistency(made, 4, 1)(says(made, always(torch.full((2, 1, 2, 2), far))), X_0[:2], t, EPS[:2])
        torch.testing.assert_close(loss, weight(made, t) * (far - clipped) ** 2)
    by_t = says(made, lambda x_t, t: 0 * x_t + (t / 2000).view(-1, 1, 1, 1))
    loss = consistency(made, 4, 1)(by_t, X_0[:2], t, EPS[:2])
    torch.testing.assert_close(loss, weight(made, t) * ((t - s) / 2000).double().square())


class Slope(nn.Module):
    """A student whose estimate is a t, with a learned."""

    def __init__(self, made: Process) -> None:
        super().__init__()
        self.a, self.made = nn.Parameter(torch.tensor(3e-4, dtype=torch.float64)), made

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return output("v", self.made.schedule, 0 * x_t + self.a * t.view(-1, 1, 1, 1), x_t, t)


def test_targets_carry_no_gradient() -> None:
    """Else that of (a t - a s)^2 would be 2 a (t - s)^2, not 2 a (t - s) t."""
    made, t = process(), torch.tensor([900])
    net, s = Slope(made), waypoints(made.schedule, t, 8, 4)[-1]
    loss = consistency(made, 8, 4)(net, X_0[:1], t, EPS[:1])
    loss.sum().backward()
    assert net.a.grad is not None
    expected = 2 * 3e-4 * (t - s) * t * weight(made, t)
    torch.testing.assert_close(net.a.grad, expected.sum().double())


def progressive(made: Process, taught: Teacher | None = None, total: int = 12) -> ProgressiveLoss:
    return ProgressiveLoss(taught or teacher(made), Error(made.parameterization), 16, 2, total)


def two_ddim_steps(
    made: Process, x_t: Tensor, t: Tensor, path: list[Tensor], estimate: Callable[..., Tensor]
) -> Tensor:
    """By Song et al. 2021, eq. 12, as printed, one image at a time."""
    ends = []
    for image in range(len(t)):
        x, before = x_t[image : image + 1], t[image : image + 1]
        for each in path:
            s = each[image : image + 1]
            if before < 0:
                break
            a, b, x_0 = at(made.schedule, before), at(made.schedule, s), estimate(x, before)
            x = b.sqrt() * x_0 + (1 - b).sqrt() * (x - a.sqrt() * x_0) / (1 - a).sqrt()
            before = s
        ends.append(x)
    return torch.cat(ends)


@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize(
    "changes", [{}, {"schedule": "linear"}, {"zero_terminal_snr": True}, {"num_timesteps": 10}], ids=str
)
def test_one_step_of_the_student_lands_where_two_of_the_teacher_do(changes: dict[str, object], phase: int) -> None:
    """The estimate from which a DDIM step does has no loss, and one that adds d has d^2 (SNR + 1)."""
    made = process(**changes)
    t = T if made.schedule.num_timesteps == 1000 else torch.tensor([9, 8, 6, 3, 2, 1, 0])
    loss = progressive(made)
    loss.phase = phase
    x_t = at(made.schedule, t).sqrt() * X_0 + (1 - at(made.schedule, t)).sqrt() * EPS
    path = waypoints(made.schedule, t, 16 >> phase, 2)
    wanted = two_ddim_steps(made, x_t, t, path, x_0_hat(made))

    def lands(x_0: float) -> Tensor:
        """Where a DDIM step with this estimate does."""
        denoiser = made.denoiser(says(made, always(torch.full_like(x_t, x_0))), THRESHOLDS["none"])
        return Ddim(denoiser, eta=0).step(x_t, t, path[-1], lambda: x_t, None)[0]

    exact = (wanted - lands(0)) / (lands(1) - lands(0))  # linear in the estimate
    torch.testing.assert_close(loss(says(made, always(exact)), X_0, t, EPS), torch.zeros(7, dtype=torch.float64))
    other = loss(says(made, always(exact + 0.1)), X_0, t, EPS)
    torch.testing.assert_close(other, 0.01 * weight(made, t), rtol=1e-6, atol=0)
    assert (path[-1] == -1).any()
    assert (path[-1] >= 0).any() or phase == 2


def test_progressive_targets_of_the_exact_teacher_are_near_the_exact_trajectory() -> None:
    made = process()
    loss = ProgressiveLoss(teacher(made), Error(made.parameterization), 512, 1, 9)
    path = waypoints(made.schedule, T[:4], 512, 2)
    x_t = made.schedule.diffuse(X_0[:4], T[:4], EPS[:4])
    there, ratio = (
        carried(made, x_t, T[:4], path[-1]),
        ((1 - at(made.schedule, path[-1])) / (1 - at(made.schedule, T[:4]))).sqrt(),
    )
    x_0 = (there - ratio * x_t) / (at(made.schedule, path[-1]).sqrt() - ratio * at(made.schedule, T[:4]).sqrt())
    assert loss(says(made, always(x_0)), X_0[:4], T[:4], EPS[:4]).max() < 1e-4


@pytest.mark.parametrize(
    ("teacher_steps", "student_steps", "total", "starts"),
    [(16, 2, 12, [0, 4, 8]), (16, 2, 10, [0, 4, 7]), (8, 4, 5, [0]), (1024, 512, 1, [0]), (4, 1, 7, [0, 4])],
)
def test_phases_share_the_training_evenly(
    teacher_steps: int, student_steps: int, total: int, starts: list[int]
) -> None:
    made = process()
    loss = ProgressiveLoss(teacher(made), Error(made.parameterization), teacher_steps, student_steps, total)
    assert loss.phases == len(starts)
    expected = [sum(step >= start for start in starts) - 1 for step in range(total)]
    assert [loss.phase_of(step) for step in range(total)] == expected
    assert loss.phase_of(total) == len(starts) - 1
    assert teacher_steps >> (loss.phases - 1) == 2 * student_steps


def test_a_phase_has_the_student_of_the_one_before_as_its_teacher() -> None:
    """Without guidance, which that has built in; the first phase has the teacher itself."""
    made = process()
    first = Teacher(teacher(made).model, 3.0, "dynamic")
    loss: Any = progressive(made, first)
    earlier = nn.Identity()
    assert loss.teacher is first
    loss.enter(2, earlier)
    assert loss.phase == 2
    assert loss.teacher.model.net is earlier
    assert (loss.teacher.guidance, loss.teacher.threshold) == (1.0, "dynamic")
    loss.enter(0, earlier)  # rolled back
    assert loss.phase == 0
    assert loss.teacher is first


class ByClass(nn.Module):
    """A network whose estimate is 0.1 (y + 1), so 0 without a class, plus 0.05 x_t."""

    def __init__(self, made: Process, fraction: float | None = None) -> None:
        super().__init__()
        self.made, self.fraction = made, fraction

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return says(self.made, always(0.05 * x_t + 0.1 * (y.view(-1, 1, 1, 1) + 1)), fraction=self.fraction)(x_t, t)


@pytest.mark.parametrize("fraction", [None, 0.3])
@pytest.mark.parametrize("kind", ["consistency", "progressive"])
@pytest.mark.parametrize("guidance", [1.0, 2.0, 0.0])
def test_the_guided_teacher_is_distilled(kind: str, guidance: float, fraction: float | None) -> None:
    """Its estimate is 0.05 x_t + 0.1 scale (y + 1) by hand: without a class, none is added for any scale."""
    made = process()
    taught = Teacher(model(made, ByClass(made, fraction), classes=("a", "b", "c")), guidance, "none")
    t, y = torch.tensor([999, 500, 20, 999]), torch.tensor([0, 2, 1, -1])
    x_0, eps = X_0[:4], EPS[:4]
    x_t = made.schedule.diffuse(x_0, t, eps)
    by_hand = guidance * 0.1 * (y + 1).double().view(-1, 1, 1, 1)
    if kind == "consistency":
        loss = ConsistencyLoss(taught, Error(made.parameterization), 1, 1)(says(made, always(0 * x_t)), x_0, t, eps, y)
        target = 0.05 * x_t + by_hand
    else:
        loss = ProgressiveLoss(taught, Error(made.parameterization), 2, 1, 1)(
            says(made, always(0 * x_t)), x_0, t, eps, y
        )
        path = waypoints(made.schedule, t, 2, 2)
        ends = [
            two_ddim_steps(
                made,
                x_t[i : i + 1],
                t[i : i + 1],
                [s[i : i + 1] for s in path],
                lambda x, _, i=i: 0.05 * x + by_hand[i],
            )
            for i in range(4)
        ]
        target = torch.cat(ends)
    torch.testing.assert_close(loss, weight(made, t) * target.square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("threshold", sorted(THRESHOLDS))
@pytest.mark.parametrize("kind", ["consistency", "progressive"])
def test_the_teachers_estimates_are_thresholded(kind: str, threshold: str) -> None:
    made, far = process(), 3 * randn(7, 1, 2, 2, seed=5)
    taught = teacher(made, always(far), threshold)
    if kind == "consistency":
        loss = ConsistencyLoss(taught, Error(made.parameterization), 1, 1)
    else:
        loss = ProgressiveLoss(taught, Error(made.parameterization), 2, 1, 1)
    target = THRESHOLDS[threshold](far)
    assert target.equal(far) == (threshold == "none")
    found = loss(says(made, always(target)), X_0, T, EPS)
    torch.testing.assert_close(found, torch.zeros(7, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["consistency", "progressive"])
def test_the_loss_of_a_student_is_the_same_in_every_parameterization(kind: str) -> None:
    """For the same estimates, of teacher and student, and with a learned variance."""
    found = []
    for name, fraction in (("v", None), ("x_0", None), ("v", 0.2), ("x_0", 0.7)):
        made = process(parameterization=name)
        taught = Teacher(model(made, says(made, x_0_hat(made), name, fraction), name), threshold="clip")
        loss = (
            ConsistencyLoss(taught, Error(made.parameterization), 8, 3)
            if kind == "consistency"
            else progressive(made, taught)
        )
        found.append(loss(says(made, some_x_0_hat, name, fraction), X_0, T, EPS))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9)
    assert (found[0] > 1e-3).all()


def test_float32_images_have_nearly_the_same_loss() -> None:
    """Coefficients are float64, so that small differences of angles keep their digits."""
    made = process()
    for loss in (
        consistency(made, 8, 4),
        ProgressiveLoss(teacher(made), Error(made.parameterization), 64, 1, 6),
    ):
        student = says(made, some_x_0_hat)
        exact, single = loss(student, X_0, T, EPS), loss(student, X_0.float(), T, EPS.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-6)
