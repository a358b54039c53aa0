"""Student and teacher compared by number of steps."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.distillation.sampling import student_sampling
from diffusion.evaluation import charts, few_steps, sets
from diffusion.evaluation.few_steps import STUDENT, TEACHER, Drawing
from diffusion.evaluation.quality import Figure
from diffusion.evaluation.samplers import Drawn
from diffusion.evaluation.sets import Images
from diffusion.model import Model
from diffusion.nn.unet import UNetOptions
from diffusion.process.build import ProcessOptions
from diffusion.sampling.build import SampleOptions, sampling_timesteps

CPU = torch.device("cpu")
CLASSES = np.array([1, 0, -1, 1, 1])


def model(seed: int, classes: tuple[str, ...] = (), timesteps: int = 100) -> Model:
    """An untrained model whose output is not zero."""
    net = UNetOptions(base_channels=8, channel_multipliers=(1,), attention_levels=(), classes=bool(classes))
    made = Model.new((1, 8, 8), net, ProcessOptions(num_timesteps=timesteps), classes, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def drawing(name: str, steps: int, pixels: Any, evaluations: int = 1) -> Drawing:
    images = np.array(pixels, np.uint8)
    return Drawing(name, Drawn(SampleOptions(steps=steps), Images(images, np.full(len(images), -1)), evaluations))


def test_drift_is_the_distance_to_the_longest_run_of_the_teacher() -> None:
    """In grey levels, the root mean square over pixels and channels, then the mean over images."""
    base = np.full((3, 2, 4, 4), 250, np.uint8)
    shifted = base - np.array([10, 20, 60], np.uint8).reshape(3, 1, 1, 1)
    uneven = base.copy()
    uneven[:, 0, :, :2] -= 200  # on a quarter of the values: 100 = sqrt(200^2 / 4)
    drawings = [
        drawing(TEACHER, 1, shifted),
        drawing(TEACHER, 50, base),  # the longest is not the last
        drawing(TEACHER, 16, uneven),
        drawing(STUDENT, 1, base),
        drawing(STUDENT, 99, uneven),  # has more steps, but is no teacher
    ]
    resamples = np.array([[1, 1, 1], [3, 0, 0], [0, 0, 3]])
    found = few_steps.drift(drawings, resamples)
    assert [value for value, _, _ in found] == pytest.approx([30, 0, 100, 0, 100])
    # The three resampled means are 30, 10 and 60; NumPy's quantiles lie between them.
    assert found[0][1:] == pytest.approx((10 + 0.05 * 20, 60 - 0.05 * 30))
    assert found[1] == (0, 0, 0)
    assert found[2][1:] == pytest.approx((100, 100))


def test_both_start_from_the_same_noise_and_have_the_same_classes() -> None:
    """Two networks of the same weights differ by nothing but the sampler, which has no say in a single step."""
    one = model(0, ("a", "b"))
    options = SampleOptions(count=5, guidance=1.0)
    pair = (
        (TEACHER, one, partial(few_steps.teacher_sampling, options)),
        (STUDENT, one, partial(student_sampling, options)),
    )
    drawings = few_steps.draw(pair, (1, 2), 3, CPU, CLASSES, lambda: None)
    assert [(each.model, each.drawn.options.steps) for each in drawings] == [
        (TEACHER, 1),
        (TEACHER, 2),
        (STUDENT, 1),
        (STUDENT, 2),
    ]
    for each in drawings:
        np.testing.assert_array_equal(each.drawn.samples.labels, CLASSES)
        np.testing.assert_array_equal(
            each.drawn.samples.pixels, sets.samples(one, each.drawn.options, 3, CPU, CLASSES).pixels
        )
    np.testing.assert_array_equal(drawings[0].drawn.samples.pixels, drawings[2].drawn.samples.pixels)
    # With gamma 0, as with eta 0, the noise estimate carries on: both are the same ODE steps.
    difference = np.abs(drawings[1].drawn.samples.pixels.astype(int) - drawings[3].drawn.samples.pixels)
    assert difference.max() <= 1
    assert not np.array_equal(drawings[0].drawn.samples.pixels, drawings[1].drawn.samples.pixels)


def test_only_the_teacher_is_guided_and_takes_twice_the_evaluations() -> None:
    teacher, student, ticks = model(0, ("a", "b")), model(1, ("a", "b")), list[int]()
    sample = SampleOptions(guidance=7.0)  # of the section sample: of no concern here
    drawings = few_steps.draw(
        (
            (TEACHER, teacher, partial(few_steps.teacher_sampling, sample.model_copy(update={"guidance": 2.0}))),
            (STUDENT, student, partial(student_sampling, sample)),
        ),
        (1, 3),
        0,
        CPU,
        CLASSES,
        lambda: ticks.append(1),
    )
    assert [each.drawn.evaluations for each in drawings] == [2, 6, 1, 3]
    assert len(ticks) == 1 + 3 + 1 + 3
    assert [each.drawn.options.guidance for each in drawings] == [2.0, 2.0, 1.0, 1.0]
    rows = few_steps.table(drawings, [(0.0, 0.0, 0.0)] * 4, [])
    assert [row["evaluations"] for row in rows] == [2, 6, 1, 3]
    assert [row["sampler"] for row in rows] == ["ddim", "ddim", "consistency", "consistency"]


def test_how_both_sample() -> None:
    given = SampleOptions(variance="analytic", threshold="dynamic", guidance=3.0, count=7, spacing="quadratic")
    student, teacher = student_sampling(given, 4), few_steps.teacher_sampling(given, 8)
    assert (student.sampler.kind, student.sampler.gamma) == ("consistency", 0)
    assert (teacher.sampler.kind, teacher.sampler.eta) == ("ddim", 0)
    for each, steps, guidance in ((student, 4, 1.0), (teacher, 8, 3.0)):
        assert (each.steps, each.spacing, each.guidance) == (steps, "angle", guidance)
        assert (each.threshold, each.count) == ("dynamic", 7)
        assert each.variance == "fixed-small"  # students have no estimate for the analytic one
    schedule = model(0).process.schedule
    assert sampling_timesteps(student, schedule) == sampling_timesteps(few_steps.teacher_sampling(given, 4), schedule)


FIGURES = [
    Figure("frechet_distance", "own", "samples", 2.0, 1.5, 2.5, 2),
    Figure("recall", "own", "samples", 0.5, 0.0, 0.6, 2),
]


def test_a_row_has_the_figures_and_the_drift_with_their_intervals() -> None:
    drawings = [drawing(TEACHER, 50, np.zeros((2, 1, 4, 4)), 100), drawing(STUDENT, 2, np.zeros((2, 1, 4, 4)), 2)]
    drifts = [(0.0, 0.0, 0.0), (3.0, 2.0, 4.0)]
    plain = few_steps.table(drawings, drifts, [])
    assert plain[1] == {
        "model": "student",
        "sampler": drawings[1].drawn.options.sampler.kind,
        "steps": 2,
        "evaluations": 2,
        "drift": 3.0,
        "drift_low": 2.0,
        "drift_high": 4.0,
        "n": 2,
    }
    rows = few_steps.table(drawings, drifts, [FIGURES, [figure._replace(value=9.0) for figure in FIGURES]])
    assert [row["evaluations"] for row in rows] == [100, 2]
    assert [row["frechet_distance"] for row in rows] == [2.0, 9.0]
    assert (rows[0]["frechet_distance_low"], rows[0]["frechet_distance_high"]) == (1.5, 2.5)
    assert few_steps.row_of(rows, STUDENT, 2) is rows[1]
    assert few_steps.row_of(rows, STUDENT, 50) is None
    assert few_steps.row_of(rows, TEACHER, 2) is None


def test_charts_have_a_line_for_each_model() -> None:
    drawings = [drawing(name, steps, np.zeros((2, 1, 4, 4))) for name in (TEACHER, STUDENT) for steps in (4, 1)]
    drifts = [(float(number), number - 0.5, number + 0.5) for number in (2, 1, 4, 3)]
    rows = few_steps.table(drawings, drifts, [FIGURES] * 4)
    drift = few_steps.chart(rows, "drift")
    assert [line.label for line in drift.lines] == [TEACHER, STUDENT]
    assert [(line.x, line.y, line.low) for line in drift.lines] == [
        ([1, 4], [1.0, 2.0], [0.5, 1.5]),
        ([1, 4], [3.0, 4.0], [2.5, 3.5]),
    ]
    assert drift.log_y  # a distance
    assert not few_steps.chart([*rows[:3], rows[3] | {"drift_low": 0.0}], "drift").log_y  # 0 is on no log axis
    assert few_steps.chart(rows, "frechet_distance").log_y
    assert not few_steps.chart([row | {"recall_low": 0.1} for row in rows], "recall").log_y  # a share
    assert charts.svg(drift).startswith("<svg")


@pytest.mark.parametrize(("channels", "shown"), [(1, ()), (3, ()), (6, (4, 3, 2)), (2, (1,))])
def test_the_picture_has_rows_of_both(channels: int, shown: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """For each of the numbers of steps in SHOWN, with at most ten images; the channels are those to be shown."""
    pixels = np.zeros((12, channels, 4, 4), np.uint8) + 10 * np.arange(channels, dtype=np.uint8).reshape(-1, 1, 1)
    drawings = [
        drawing(name, steps, pixels + index)
        for index, name in enumerate((TEACHER, STUDENT))
        for steps in (1, 2, 3, 16, 50)
    ]
    asked: list[Any] = []
    monkeypatch.setattr(few_steps, "strip", lambda *given, **named: asked.append((given, named)) or b"png")
    assert few_steps.picture(drawings, shown) == b"png"
    (((titles, rows, grouped), _),) = asked
    assert [label for label, _ in rows] == [
        f"{name}\n{steps}" for name in (TEACHER, STUDENT) for steps in ("1 step", "2 steps", "50 steps")
    ]
    assert grouped == 3
    assert {len(images) for _, images in rows} == {len(titles)} == {10}
    expected = [10 * channel for channel in shown] or [10 * channel for channel in range(channels)]
    assert [int(level) for level in rows[0][1][0][:, 0, 0]] == expected
    assert [int(level) for level in rows[3][1][0][:, 0, 0]] == [level + 1 for level in expected]
    monkeypatch.undo()
    assert few_steps.picture(drawings, shown).startswith(b"\x89PNG")
