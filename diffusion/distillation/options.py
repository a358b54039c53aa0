"""Options of distillation."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from diffusion.distillation.losses import ConsistencyLoss, Error, ProgressiveLoss
from diffusion.distillation.teacher import Teacher
from diffusion.process.timesteps import TIMESTEPS
from diffusion.sections import AutoFraction, Choice, NonNegative, OneOf, Positive
from diffusion.training.options import MuonOptions, Optimizer, TrainOptions


def _solves_no_further_than_the_image(method: "ConsistencyMethod") -> None:
    if method.solver_steps > method.points:
        raise ValueError(f"solver_steps ({method.solver_steps}) exceeds points ({method.points}), the whole way")


class ConsistencyMethod(Choice):
    """Consistency distillation (Song et al. 2023)."""

    rules = (_solves_no_further_than_the_image,)

    kind: Literal["consistency"] = "consistency"
    """Name of the method."""
    points: Annotated[int, Field(ge=2, le=1000)] = 8
    """Number of steps into which a whole trajectory of the teacher is divided."""
    solver_steps: Annotated[int, Field(ge=1, le=1000)] = 4
    """How many of these the teacher takes to make a target; as many as `points`: always up to the image."""


def _halves(method: "ProgressiveMethod") -> None:
    ratio, rest = divmod(method.teacher_steps, method.student_steps)
    if rest or ratio < 2 or ratio & (ratio - 1):
        raise ValueError(
            f"teacher_steps ({method.teacher_steps}) must be 2, 4, 8, ... times student_steps ({method.student_steps})"
        )


class ProgressiveMethod(Choice):
    """Progressive distillation (Salimans & Ho 2022)."""

    rules = (_halves,)

    kind: Literal["progressive"] = "progressive"
    """Name of the method."""
    teacher_steps: Annotated[int, Field(ge=2, le=1024)] = 16
    """Number of DDIM steps of the teacher, halved until it is `student_steps`."""
    student_steps: Annotated[int, Field(ge=1, le=512)] = 2
    """Number of steps of the student in the end."""


DISTILLABLE = ("v", "x_0")
"""Parameterizations whose networks can estimate the image from noise alone."""
Method = ConsistencyLoss | ProgressiveLoss
METHODS: dict[str, Callable[[Any, Teacher, Error, int], Method]] = {
    "consistency": lambda options, teacher, error, _: ConsistencyLoss(
        teacher, error, options.points, options.solver_steps
    ),
    "progressive": lambda options, teacher, error, steps: ProgressiveLoss(
        teacher, error, options.teacher_steps, options.student_steps, steps
    ),
}
"""Constructors by name; each takes the method's options, the teacher, the error, and the number of training steps."""
METHOD_OPTIONS: dict[str, type[Choice]] = {
    "consistency": ConsistencyMethod,
    "progressive": ProgressiveMethod,
}


def _trains_without_augmentation(distill: "DistillOptions") -> None:
    if distill.augment != 0:  # also auto
        raise ValueError("augment must be 0: the teacher has learned images without augmentation")


def _measures_one_loss(distill: "DistillOptions") -> None:
    if distill.method.kind == "progressive" and (distill.keep_best or distill.patience):
        raise ValueError(
            "progressive needs keep_best: false and patience: 0, since the held-out losses of its phases differ"
        )


class DistillOptions(TrainOptions):
    """Distillation of the trained model into one that samples in one to four steps; trained as in section `train`."""

    rules: ClassVar[tuple[Callable[[Any], None], ...]] = (
        *TrainOptions.rules,
        _trains_without_augmentation,
        _measures_one_loss,
    )

    method: Annotated[Any, OneOf(METHODS, METHOD_OPTIONS)] = ConsistencyMethod()
    """What the student learns. consistency: to estimate the same image at all points of the teacher's trajectory (Song
    et al. 2023); progressive: to take one step for two of the teacher's, again and again (Salimans & Ho 2022)."""
    huber: Annotated[float, Field(ge=0, le=1)] = 0.005
    """c of the pseudo-Huber metric sqrt(e^2 + c^2) - c (Song & Dhariwal 2024), in which large errors e count less than
    squared; 0: the squared error."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Scale of classifier-free guidance of the teacher, which the student then has built in."""
    sampling_steps: Annotated[int, Field(ge=1, le=16)] = 2
    """Number of steps of the student's samples, and by default of its sampler.onnx."""
    steps: NonNegative = 220
    """Number of optimizer steps; 0 if `epochs` is set instead."""
    batch_size: Positive = 32
    """Global batch size, i.e. images per step over all processes."""
    optimizer: Optimizer = MuonOptions(learning_rate=0.006)
    """adamw, muon or sgd, as in section `train`."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    """Peak learning rate of AdamW or SGD."""
    warmup_steps: NonNegative = 5
    """Steps of linear learning rate warmup."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay, as in section `train`."""
    timesteps: Annotated[str, OneOf(TIMESTEPS)] = "angle"
    """Distribution of the training timesteps, as in section `train`; angle suits distillation."""
    augment: AutoFraction = 0.0
    """Must be 0."""
    preview_every: Positive = 110
    """Steps between evaluations, each with the held-out loss and a grid of samples."""
