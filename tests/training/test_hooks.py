"""The hooks of the loop: what is measured, drawn and reported at which step."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.errors import Stopped
from diffusion.evaluation.heldout import Estimate, quick_mse
from diffusion.evaluation.live import Measured
from diffusion.model import Config, Model
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.process import build
from diffusion.process.build import ProcessOptions
from diffusion.samples import draw_samples, grid_png
from diffusion.signals import StopSignals
from diffusion.training import loop
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.hooks import Hooks, preview_options, preview_path
from diffusion.training.state import State
from flows.params import Params, load
from tests.training.test_loop import changed, fresh_state

CPU = torch.device("cpu")


class Recorder:
    """Records what is reported of a training: metrics, pictures, and the progress that a user sees."""

    def __init__(self) -> None:
        self.points = list[tuple[int, dict[str, float]]]()
        self.pictures = list[tuple[int, bytes]]()
        self.done = 0
        self.notes = list[str]()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.points.append((step, dict(values)))

    def image(self, path: Path, step: int) -> None:
        self.pictures.append((step, path.read_bytes()))

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount
        self.notes.append(note)


@pytest.fixture
def params(pairs_tree: Path) -> Params:
    train = {"steps": 12, "log_every": 5, "preview_every": 8, "timesteps": "stored"}
    return changed(load(pairs_tree / "params.yaml"), train=train)


def watch(
    params: Params,
    state: State,
    pairs_tree: Path,
    recorder: Recorder | None,
    previews: Path,
    stop: StopSignals | None = None,
    measure: Callable[..., Estimate] | None = None,
) -> Hooks:
    directory = pairs_tree / "data" / "pairs"
    process, heldout = build.process(params.process), Pairs(directory, "val")
    config = Config(shape=(1, 8, 8), classes=(), network=params.network, process=params.process, x_0_mse=None)
    trainer = loop.Trainer(params.train, 3, process.loss, Batches(Pairs(directory, "train"), 0, 32), state.net)
    drawing = preview_options(params.process).model_copy(update={"steps": 2, "count": 4})
    model = Model(state.average, process, config)
    progress: object = recorder
    return Hooks(
        trainer,
        model,
        measure or (lambda model, check_stop: quick_mse(model, heldout, CPU, check_stop)),
        CPU,
        drawing,
        previews,
        stop or StopSignals(),
        progress,
        recorder,
        10**9,
    )  # type: ignore[arg-type]


def test_the_metrics_logged_during_training(
    params: Params, pairs_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, recorder = fresh_state(params), Recorder()
    hooks = watch(params, state, pairs_tree, recorder, tmp_path)
    measured = list[Estimate]()

    def preview(state: State) -> None:
        measured.append(hooks.measure(hooks.model, lambda: None))
        hooks.preview(state)

    loop.train(state, hooks.trainer, Checkpoints(tmp_path), report=hooks.report, preview=preview, stop_signal=lambda: 0)
    losses = [(step, point) for step, point in recorder.points if "loss" in point]
    assert [step for step, _ in losses] == [5, 10, 12]
    for (_, point), row in zip(losses, state.loss_curve, strict=True):
        assert point.pop("images_per_second") == pytest.approx(point.pop("tflop_per_second") / 3e-3)
        assert point == {name: value for name, value in row.items() if name != "step"}
    assert [(step, point) for step, point in recorder.points if "loss" not in point] == [
        (step, {"heldout_mse": mse, "heldout_mse_se": se, "skipped_steps": 0})
        for step, (mse, se) in zip((8, 12), measured, strict=True)
    ]
    assert [row["mse"] for row in state.heldout_curve] == [found.mse for found in measured]
    assert [row["step"] for row in state.heldout_curve] == [8, 12]
    assert capsys.readouterr().err.splitlines() == [
        f"train: step {step}: held-out MSE {mse:.4f} ± {se:.4f}"
        for step, (mse, se) in zip((8, 12), measured, strict=True)
    ]
    drawn = grid_png(draw_samples(hooks.model, hooks.sample_options, 3, CPU))
    assert [step for step, _ in recorder.pictures] == [8, 12]
    assert recorder.pictures[1][1] == drawn == preview_path(tmp_path, 12).read_bytes()
    assert recorder.done == 12 * 32
    measuring = "measuring the held-out error and drawing a preview"
    assert measuring in recorder.notes
    of_steps = [note for note in recorder.notes if note != measuring]
    assert of_steps[:4] == [""] * 4
    assert of_steps[5:9] == [f"loss {state.loss_curve[0]['loss']:.4f}"] * 4


def test_the_quality_of_samples_is_logged_if_asked_for(
    params: Params, pairs_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, recorder = fresh_state(params), Recorder()
    hooks = watch(params, state, pairs_tree, recorder, tmp_path)
    quality: Any = Mock(return_value=Measured(0.25, 0.125, 3.0, 0.5))
    hooks.quality = quality
    loop.step(state, hooks.trainer)
    hooks.preview(state)
    ((step, point),) = recorder.points
    assert step == 1
    assert {name: value for name, value in point.items() if name.startswith("quality")} == {
        "quality_kid": 0.25,
        "quality_kid_se": 0.125,
        "quality_frechet_distance": 3.0,
        "quality_frechet_distance_se": 0.5,
    }
    assert capsys.readouterr().err.endswith(", KID 0.2500 ± 0.1250, Fréchet distance 3.000 ± 0.500\n")
    assert list(state.heldout_curve[0]) == ["step", "mse"]


def test_the_progress_counts_epochs_if_these_are_given(params: Params, pairs_tree: Path, tmp_path: Path) -> None:
    params = changed(params, train={"steps": 0, "epochs": 3, "batch_size": 32, "log_every": 10})
    params = params.model_copy(update={"train": params.train.for_images(75)})  # ceil(3 * 75 / 32) steps
    state, recorder = fresh_state(params), Recorder()
    hooks = watch(params, state, pairs_tree, recorder, tmp_path)
    for _ in range(params.train.steps):
        loop.step(state, hooks.trainer)
        hooks.report(state)
    epochs = [note.partition(",")[0] for note in recorder.notes]
    assert epochs == [f"epoch {number} of 3" for number in (1, 1, 2, 2, 2, 3, 3, 3)]


def test_the_rate_counts_the_steps_since_the_last_point_alone(
    params: Params, pairs_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that each step advances by 1/8 s, and each measurement by 100 s."""
    clock = [0.0]
    monkeypatch.setattr("diffusion.training.hooks.time.monotonic", lambda: clock[0])

    def slow(*_: object) -> Estimate:
        clock[0] += 100
        return Estimate(0.5, 0.1)

    state, recorder = fresh_state(params), Recorder()
    hooks = watch(params, state, pairs_tree, recorder, tmp_path, measure=slow)
    hooks._restart_clock()
    for step in range(1, 11):
        loop.step(state, hooks.trainer)
        clock[0] += 1 / 8
        hooks.report(state)
        if step == 8:
            hooks.preview(state)
    assert [point["images_per_second"] for _, point in recorder.points if "loss" in point] == [256, 256]


def test_nothing_is_logged_if_all_steps_were_skipped(params: Params, pairs_tree: Path, tmp_path: Path) -> None:
    state, recorder = fresh_state(params), Recorder()
    state.step = 5
    watch(params, state, pairs_tree, recorder, tmp_path).report(state)
    assert recorder.points == state.loss_curve == []


def test_a_stop_interrupts_a_measurement(params: Params, pairs_tree: Path, tmp_path: Path) -> None:
    state, stop = fresh_state(params), StopSignals()
    hooks = watch(params, state, pairs_tree, Recorder(), tmp_path, stop)
    stop._note(signal.SIGTERM, None)
    with pytest.raises(Stopped) as stopped:
        hooks.preview(state)
    assert stopped.value.signum == signal.SIGTERM
    assert (state.heldout_curve, list(tmp_path.iterdir())) == ([], [])


def test_a_stop_interrupts_sampling(params: Params, pairs_tree: Path, tmp_path: Path) -> None:
    state, stop = fresh_state(params), StopSignals()

    def measured(*_: object) -> Estimate:
        stop._note(signal.SIGTERM, None)
        return Estimate(0.5, 0.1)

    with pytest.raises(Stopped):
        watch(params, state, pairs_tree, Recorder(), tmp_path, stop, measured).preview(state)
    assert (state.heldout_curve, list(tmp_path.iterdir())) == ([], [])


def test_without_anyone_to_tell_it_measures_all_the_same(params: Params, pairs_tree: Path, tmp_path: Path) -> None:
    state = fresh_state(params)
    hooks = watch(params, state, pairs_tree, None, tmp_path)
    loop.step(state, hooks.trainer)
    hooks.report(state)
    hooks.preview(state)
    assert np.isfinite(state.heldout_curve[0]["mse"])
    with Image.open(preview_path(tmp_path, 1)) as image:
        assert image.size[0] > 256


@pytest.mark.parametrize(
    ("process", "steps", "variance"),
    [
        (ProcessOptions(), 20, "fixed-small"),
        (ProcessOptions(num_timesteps=10, learned_variance=True), 10, "learned"),
    ],
)
def test_previews_are_drawn_in_few_steps(process: ProcessOptions, steps: int, variance: str) -> None:
    chosen = preview_options(process)
    assert (chosen.sampler.kind, chosen.steps, chosen.spacing) == ("dpm-solver++", steps, "quadratic")
    assert (chosen.variance, chosen.threshold, chosen.guidance, chosen.count) == (variance, "clip", 1.0, 36)
