"""The losses of distillation: the student's estimate of the clean image against one made from the teacher's steps.

Both let the student jump from x_t further along the teacher's trajectory than the teacher can in one evaluation. The
error is weighted by 1 / (1 - alpha_bar_t), SNR + 1, so that with the parameterization v it is that of the network's
output (Salimans & Ho 2022, section 4).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.distillation.teacher import Teacher, follow, waypoints
from diffusion.errors import UserError
from diffusion.model import Model
from diffusion.nn.layers import Network
from diffusion.process.parameterization import Parameterization, split
from diffusion.process.schedule import Schedule, times
from diffusion.sampling.sampler import Ddim, DpmSolver

Student = Callable[..., Tensor]
"""Maps x_t (B, C, H, W), t int64 (B,) and classes y int64 (B,) to the network's raw output."""


@dataclass(frozen=True)
class Error:
    """The pseudo-Huber metric sqrt(e^2 + c^2) - c, Song & Dhariwal 2024, section 3.3; the squared error if c is 0.

    c is `huber`, and e^2 is the mean of (SNR + 1) (x_0_hat - target)^2 over the values of an image.
    """

    parameterization: Parameterization
    huber: float = 0.0

    def __call__(self, out: Tensor, x_t: Tensor, t: Tensor, target: Tensor) -> Tensor:
        """The error of each image, (B,), for the network's raw output `out` at x_t."""
        x_0_hat = self.parameterization.to_x_0(split(out, x_t.shape[1])[0], x_t, t)
        scale = (1 - self.parameterization.schedule(t)).rsqrt()
        squared = times(scale, x_0_hat - target).square().mean(dim=(1, 2, 3))
        return (squared + self.huber**2).sqrt() - self.huber if self.huber else squared


@dataclass(frozen=True)
class ConsistencyLoss:
    """Consistency distillation: the same estimate at all points of a trajectory; Song et al. 2023, algorithm 2.

    The teacher solves its ODE from x_t for `solver_steps` of at most `points` steps, which are even in the angle of
    `Schedule.angle`. The target is where this arrives at the image, or else the student's own estimate there. Like
    easy consistency tuning (Geng et al. 2024), this begins with the teacher's weights and has no second, averaged
    student. Its targets, from data instead of the teacher's steps, need smaller steps and more training.
    """

    teacher: Teacher
    error: Error
    points: int
    solver_steps: int

    @property
    def schedule(self) -> Schedule:
        return self.error.parameterization.schedule

    def __call__(self, net: Student, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
        """Loss of each image, (B,), for `t` int64 (B,), noise `eps` (B, C, H, W) and classes `y` int64 (B,)."""
        x_t = self.schedule.diffuse(x_0, t, eps)
        path = waypoints(self.schedule, t, self.points, self.solver_steps)
        x_s, s = follow(DpmSolver(self.teacher.denoiser(y), stochastic=False), x_t, t, path)
        target = x_s
        if self.solver_steps < self.points:
            with torch.no_grad():
                out, _ = split(net(x_s, s.clamp(min=0).to(x_s.device), y), x_s.shape[1])
                own = self.error.parameterization.to_x_0(out, x_s, s.clamp(min=0)).clamp(-1, 1)
            target = torch.where((s < 0).to(x_s.device).view(-1, 1, 1, 1), x_s, own)
        return self.error(net(x_t, t.to(x_t.device), y), x_t, t, target)


@dataclass
class ProgressiveLoss:
    """Progressive distillation: one DDIM step for two of the teacher's; Salimans & Ho 2022, algorithm 2.

    A phase trains a student with half as many steps as its teacher. Then it becomes the teacher of the next phase,
    down to `student_steps`. The phases share the training evenly. Unlike in the paper, t is not limited to the points
    where the student samples, so that one student can take other numbers of steps; and a phase continues with the
    weights and the optimizer of the phase before.
    """

    first: Teacher
    error: Error
    teacher_steps: int
    student_steps: int
    total: int
    """Number of training steps of all phases."""
    phase: int = field(default=0, init=False)
    teacher: Teacher = field(init=False)

    def __post_init__(self) -> None:
        if self.total < self.phases:
            raise UserError(
                f"distill.steps: {self.total} is less than the number of phases, {self.phases}, in which "
                f"{self.teacher_steps} steps of the teacher are halved to {self.student_steps}; take more steps"
            )
        self.teacher = self.first

    @property
    def schedule(self) -> Schedule:
        return self.error.parameterization.schedule

    @property
    def phases(self) -> int:
        return (self.teacher_steps // self.student_steps).bit_length() - 1

    def phase_of(self, step: int) -> int:
        """The phase to which a training step belongs."""
        return min(step * self.phases // self.total, self.phases - 1)

    def enter(self, phase: int, earlier: Network) -> None:
        """Take the teacher of a phase: the first one, or `earlier`, the student of the phase before."""
        self.phase = phase
        if phase:
            process, config = self.first.model.process, self.first.model.config
            config = config.model_copy(update={"x_0_mse": None})
            self.teacher = Teacher(Model(earlier, process, config), 1.0, self.first.threshold)
        else:
            self.teacher = self.first

    def __call__(self, net: Student, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
        """Loss of each image, (B,), for `t` int64 (B,), noise `eps` (B, C, H, W) and classes `y` int64 (B,)."""
        schedule = self.schedule
        x_t = schedule.diffuse(x_0, t, eps)
        path = waypoints(schedule, t, self.teacher_steps >> self.phase, 2)
        x_s, s = follow(Ddim(self.teacher.denoiser(y), eta=0), x_t, t, path)
        # The x_0 from which a single DDIM step arrives at x_s.
        alpha_bar_t, alpha_bar_s = schedule(t), schedule(s)
        ratio = ((1 - alpha_bar_s) / (1 - alpha_bar_t)).sqrt()
        target = times(1 / (alpha_bar_s.sqrt() - ratio * alpha_bar_t.sqrt()), x_s - times(ratio, x_t))
        return self.error(net(x_t, t.to(x_t.device), y), x_t, t, target)
