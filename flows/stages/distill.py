"""Stage distill: distil the trained model into a student that samples in one to four steps."""

from functools import partial

import torch

from diffusion.distillation.heldout import heldout_loss
from diffusion.distillation.losses import Error, ProgressiveLoss
from diffusion.distillation.options import DISTILLABLE, METHODS
from diffusion.distillation.sampling import student_sampling
from diffusion.distillation.teacher import Teacher
from diffusion.errors import UserError
from diffusion.evaluation.heldout import Estimate
from diffusion.model import Model, load_model, network_from
from diffusion.nn.layers import Network
from diffusion.pairs.pairs import Pairs
from diffusion.training.hooks import CheckStop
from diffusion.training.state import State
from flows.params import Params
from flows.paths import Paths
from flows.stages.training import Recipe, carry_out


def run(params: Params, paths: Paths) -> None:
    """Distil a model; an interrupted distillation with the same parameters, teacher, data and code is resumed."""
    paths = Paths(paths.root, student=True)
    carry_out(params, paths, partial(recipe, params, paths))


def recipe(params: Params, paths: Paths, device: torch.device) -> Recipe:
    """How the student is trained; raises UserError if the model cannot be distilled."""
    teacher, options = load_model(paths.teacher, device), params.distill
    pairs, heldout = Pairs(paths.pairs, "train"), Pairs(paths.pairs, "val")
    pairs.check_process(teacher.process.schedule.alpha_bar.numpy(), teacher.shape)
    if (predicts := teacher.config.process.parameterization) not in DISTILLABLE:
        raise UserError(
            f"{paths.teacher}: predicts {predicts} (process.parameterization), which says little about the image where "
            f"sampling starts; distillation needs a model trained to predict {' or '.join(DISTILLABLE)}"
        )
    if options.guidance != 1 and not teacher.num_classes:
        raise UserError(f"distill.guidance: {paths.teacher} is not conditioned on classes; set it to 1.0")
    if options.sampling_steps > (most := teacher.process.schedule.num_timesteps):
        raise UserError(
            f"distill.sampling_steps: {options.sampling_steps} is more than the timesteps of {paths.teacher} ({most})"
        )
    config = teacher.config.model_copy(update={"x_0_mse": None, "scheduler": None})
    options = options.for_images(pairs.images)
    loss = METHODS[options.method.kind](
        options.method,
        Teacher(teacher, options.guidance, params.sample.threshold),
        Error(teacher.process.parameterization, options.huber),
        options.steps,
    )

    def initial() -> Network:
        return network_from(teacher, config).eval()  # the targets are exact, so that dropout would only add noise

    def enter_phase(state: State, step: int) -> None:
        if isinstance(loss, ProgressiveLoss) and state.earlier is not None:
            loss.enter(loss.phase_of(step), state.earlier)

    def before_step(state: State) -> None:
        if isinstance(loss, ProgressiveLoss) and state.earlier is not None:
            if state.step and loss.phase_of(state.step) != loss.phase_of(state.step - 1):
                state.copy_average_into(state.earlier)
            enter_phase(state, state.step)

    def measure(state: State, model: Model, check_stop: CheckStop) -> Estimate:
        enter_phase(state, max(state.step - 1, 0))
        return heldout_loss(loss, state.timesteps, model, heldout, device, check_stop)

    return Recipe(
        stage="distill",
        options=options,
        config=config,
        process=teacher.process,
        net=initial,
        start="the teacher's weights",
        loss=loss,
        measure=measure,
        error="held-out loss",
        drawing=student_sampling(params.sample, options.sampling_steps).model_copy(update={"count": 36}),
        before_step=before_step,
        replaces_teacher=isinstance(loss, ProgressiveLoss),
    )
