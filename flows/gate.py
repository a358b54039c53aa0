"""The gate: what a version must meet to become champion, and the figures that it compares.

`tracking.gate` lists rules, and a version must meet all of them. `limit` bounds a figure; `better` and `not-worse`
compare it with the champion's, by the 95 % interval of the difference, challenger minus champion, dbar ± 1.96 se:

- A figure with a value for each image is paired. With d_i the difference on image i of n, dbar is the mean of d_i and
  se = sqrt(sum_i (d_i - dbar)^2 / (n (n - 1))). What both versions share, such as images that are hard for any model,
  cancels.
- A figure of a whole set of samples is not. dbar is the difference of the estimates, and
  se = sqrt(se_challenger^2 + se_champion^2), each from the half-width of the figure's own 95 % interval.

The intervals cover the noise of measuring on a finite number of images, not the variation between trainings with
different seeds. Figures measured on other data, or in another way, are not comparable.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diffusion.errors import counted
from diffusion.sections import Choice, OneOf

Z = 1.96
"""Half the width of a normal 95 % interval, in standard errors."""
MET, NOT_MET, NOT_COMPARABLE, FIRST = "met", "not met", "not comparable", "no champion yet"
"""Verdicts on a rule: MET and FIRST let a version pass."""

Values = NDArray[np.float64]
"""A figure for each image, (n,)."""


class NotComparable(Exception):
    """A figure was not measured, or not on the same data and in the same way; the message names it and says why."""


@dataclass(frozen=True)
class Scores:
    """What evaluate measured of one version."""

    version: str
    """For sentences: `version 3`."""
    report: Mapping[str, Any]
    """reports/evaluate.json, with the digests in scored.json of what was measured."""
    by_image: Mapping[str, Values]
    """The figures with a value for each image."""
    fault: str = "was not measured"
    """What to say about a figure that is in neither."""


class Difference(NamedTuple):
    """Challenger minus champion: estimate, half the width of its 95 % interval, and what it was measured on."""

    value: float
    margin: float
    measured_on: str


@dataclass(frozen=True)
class Figure(ABC):
    """A figure in reports/evaluate.json that rules can name."""

    name: str
    title: str
    same: tuple[str, ...]
    """What the reports of two versions must agree on, for their figures to be comparable."""
    higher_is_better: bool = False

    def value(self, scores: Scores) -> float:
        """The figure; raises NotComparable if it was not measured, or is no finite number."""
        if self.name in scores.by_image:
            value = float(scores.by_image[self.name].mean())
        elif self.name in scores.report:
            value = float(scores.report[self.name])
        else:
            raise NotComparable(f"{self.title} of {scores.version} {scores.fault}")
        if not math.isfinite(value):
            raise NotComparable(f"{self.title} of {scores.version} is {value}")
        return value

    def difference(self, new: Scores, old: Scores) -> Difference:
        """The difference of two versions' figures; raises NotComparable."""
        self.value(old)
        for key in self.same:
            before, now = old.report.get(key), new.report.get(key)
            if now is None or now != before:
                shown = [f"{_short(scores.report.get(key))} for {scores.version}" for scores in (old, new)]
                raise NotComparable(f"{self.title} is not comparable: {key} is {', '.join(shown)}")
        return self._difference(new, old)

    @abstractmethod
    def _difference(self, new: Scores, old: Scores) -> Difference: ...


class OfImages(Figure):
    """A mean over the held-out images."""

    def _difference(self, new: Scores, old: Scores) -> Difference:
        for scores in (new, old):
            if self.name not in scores.by_image:
                raise NotComparable(f"{self.title} of each image of {scores.version} {scores.fault}")
        now, before = new.by_image[self.name], old.by_image[self.name]
        if len(now) != len(before):
            shown = f"{len(before)} for {old.version}, {len(now)} for {new.version}"
            raise NotComparable(f"{self.title} is not comparable: the number of images is {shown}")
        mean, margin = paired(now, before)
        return Difference(mean, margin, counted(len(now), "image", spec=","))


class OfSamples(Figure):
    """A figure of a set of samples."""

    def _difference(self, new: Scores, old: Scores) -> Difference:
        margin = math.hypot(self._margin(new), self._margin(old))
        return Difference(self.value(new) - self.value(old), margin, f"{new.report['quality_images']:,} samples each")

    def _margin(self, scores: Scores) -> float:
        """Half the width of the figure's 95 % interval; the larger half where the figure's range cuts off the other."""
        value, low, high = (scores.report.get(f"{self.name}{end}") for end in ("", "_low", "_high"))
        if value is None or low is None or high is None:
            raise NotComparable(f"{self.title} of {scores.version} has no interval")
        return float(max(high - value, value - low))


def paired(new: Values, old: Values) -> tuple[float, float]:
    """Mean of the differences between values (n,), and half the width of its 95 % interval, infinite if n = 1."""
    difference, n = new - old, len(new)
    return float(difference.mean()), Z * float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf


def _short(value: Any) -> str:
    """A value for a sentence: of a digest, its beginning."""
    return "none" if value is None else f"{value:.12}" if isinstance(value, str) else str(value)


_SAMPLES = ("quality_images", "quality_reference_images", "frechet_distance_heldout")
"""The distance of held-out images depends on the data and the features alone, so that it identifies both."""
FIGURES = {
    figure.name: figure
    for figure in (
        OfImages("val_mse", "val MSE", ("val_pairs_sha256",)),
        OfImages("bits_per_dim", "bits/dim", ("pairs_sha256", "bits_per_dim_values")),
        OfSamples("frechet_distance", "Fréchet distance", _SAMPLES),
        OfSamples("kid", "KID", _SAMPLES),
        OfSamples("precision", "precision", _SAMPLES, higher_is_better=True),
        OfSamples("recall", "recall", _SAMPLES, higher_is_better=True),
        OfSamples("density", "density", _SAMPLES, higher_is_better=True),
        OfSamples("coverage", "coverage", _SAMPLES, higher_is_better=True),
    )
}


class Row(NamedTuple):
    """The verdict on one rule, as plain data for tables."""

    figure: str
    """Its title."""
    rule: str
    """In words: `at most 0.5`, `significantly lower`."""
    margin: float
    """The rule's number: the limit, or the margin `by`."""
    challenger: float | None = None
    champion: float | None = None
    difference: float | None = None
    """Challenger minus champion, and the ends of its 95 % interval."""
    low: float | None = None
    high: float | None = None
    verdict: str = NOT_COMPARABLE
    reason: str = ""
    """What follows from which figures, as a part of a sentence."""

    @property
    def met(self) -> bool:
        """Whether the version may become champion."""
        return self.verdict in (MET, FIRST)


class Rule(Choice, ABC):
    """A condition on one figure."""

    figure: Annotated[str, OneOf(FIGURES)] = "val_mse"
    """The figure, as named in reports/evaluate.json."""

    def judge(self, new: Scores, old: Scores | None) -> Row:
        """The verdict on a challenger; `old` is the champion, None if there is none."""
        figure = FIGURES[self.figure]
        row = self._row(figure)
        try:
            return self._judge(row, figure, new, old)
        except NotComparable as error:
            return row._replace(reason=str(error))

    @abstractmethod
    def _row(self, figure: Figure) -> Row:
        """The rule, without a verdict."""

    @abstractmethod
    def _judge(self, row: Row, figure: Figure, new: Scores, old: Scores | None) -> Row:
        """The row with measurements and verdict; raises NotComparable."""


class Limit(Rule):
    """The figure is at most `value`; at least, if higher is better."""

    kind: Literal["limit"] = "limit"
    """Kind of rule."""
    value: float = 0.5
    """The limit."""

    def _row(self, figure: Figure) -> Row:
        return Row(figure.title, f"at {'least' if figure.higher_is_better else 'most'} {self.value:g}", self.value)

    def _judge(self, row: Row, figure: Figure, new: Scores, _: Scores | None) -> Row:
        value = figure.value(new)
        met = value >= self.value if figure.higher_is_better else value <= self.value
        lies = row.rule if met else f"{'below' if figure.higher_is_better else 'above'} the limit, {self.value:g}"
        reason = f"{figure.title} {value:.4f} is {lies}"
        return row._replace(challenger=value, verdict=MET if met else NOT_MET, reason=reason)


class Comparison(Rule):
    """A condition on the difference from the champion; every version meets it while there is no champion."""

    by: Annotated[float, Field(ge=0)] = 0.0
    """Margin, in units of the figure."""
    worse: ClassVar[bool]
    """Whether a version must not be worse, or must be better."""

    def _row(self, figure: Figure) -> Row:
        negation, direction = "not " if self.worse else "", "higher" if self._upwards(figure) else "lower"
        margin = f" by more than {self.by:g}" if self.by else ""
        return Row(figure.title, f"{negation}significantly {direction}{margin}", self.by)

    def _upwards(self, figure: Figure) -> bool:
        """Whether the rule is about higher values of the figure."""
        return self.worse != figure.higher_is_better

    def _judge(self, row: Row, figure: Figure, new: Scores, old: Scores | None) -> Row:
        if old is None:
            return row._replace(verdict=FIRST, reason=f"{figure.title}: {FIRST}")
        row = row._replace(challenger=figure.value(new))
        value, margin, measured_on = figure.difference(new, old)
        row = row._replace(champion=figure.value(old), difference=value, low=value - margin, high=value + margin)
        sign = 1 if self._upwards(figure) else -1
        beyond = sign * value - margin > self.by
        side = f"{'above' if sign > 0 else 'below'} {f'{sign * self.by:g}' if self.by else 'zero'}"
        lies = f"is {side}" if beyond else f"is not {side} by more than the measurement noise"
        reason = (
            f"{figure.title} {row.challenger:.4f} against {row.champion:.4f} of {old.version}: the difference, "
            f"{value:+.4g} ± {margin:.2g} (95 %, {measured_on}), {lies}"
        )
        return row._replace(verdict=MET if beyond != self.worse else NOT_MET, reason=reason)


class Better(Comparison):
    """The figure is better than the champion's by more than `by`, beyond the noise of the measurement."""

    kind: Literal["better"] = "better"
    """Kind of rule."""
    worse = False


class NotWorse(Comparison):
    """The figure is not worse than the champion's by more than `by`, as far as the measurement shows."""

    kind: Literal["not-worse"] = "not-worse"
    """Kind of rule."""
    worse = True


RULES: dict[str, type[Choice]] = {"limit": Limit, "better": Better, "not-worse": NotWorse}
Gate = tuple[Annotated[Any, OneOf(RULES, RULES)], ...]
"""Type of `tracking.gate`."""


class Decision(NamedTuple):
    """Whether a version becomes champion, and why."""

    promoted: bool
    rows: tuple[Row, ...]
    reason: str


def decide(gate: Sequence[Rule], new: Scores, old: Scores | None) -> Decision:
    """Judge a challenger by all rules of the gate; `old` is the champion, None if there is none."""
    rows = tuple(rule.judge(new, old) for rule in gate)
    promoted, reasons = _outcome(rows)
    return Decision(promoted, rows, f"the first version; {reasons}" if promoted and not old else reasons)


def for_students(gate: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of a gate that hold for students, which are compared with students only: those on samples.

    If there are none, a student's Fréchet distance must not be worse than that of the champion.
    """
    rules = tuple(rule for rule in gate if isinstance(FIGURES[rule.figure], OfSamples))
    return rules or (NotWorse(figure="frechet_distance"),)


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """The decision on a version in a sentence, from the rows of its table."""
    promoted, reasons = _outcome([Row(**row) for row in rows])
    return f"{'Promoted to champion' if promoted else 'Not promoted'}: {reasons}."


def _outcome(rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether a version becomes champion, and the reasons."""
    if failed := [row for row in rows if not row.met]:
        return False, "; ".join(row.reason for row in failed)
    return True, "; ".join(row.reason for row in rows if row.verdict == MET) or "tracking.gate has no rules"
