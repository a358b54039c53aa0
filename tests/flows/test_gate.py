"""The rules of the gate, as functions of two versions' scores."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffusion.errors import UserError
from flows import params as parameters
from flows import yaml_files
from flows.changes import lay_over
from flows.gate import FIGURES, Better, Limit, NotWorse, Rule, Scores, decide, for_students, paired
from flows.params import Params
from tests.flows.test_params import ROOT

DIGESTS = {"val_pairs_sha256": "a" * 64, "pairs_sha256": "b" * 64, "bits_per_dim_values": 17}
MEASURED = {"frechet_distance_heldout": 0.75, "quality_images": 1000, "quality_reference_images": 4096}


def of_images(version: str, values: Any, figure: str = "val_mse") -> Scores:
    return Scores(version, DIGESTS, {figure: np.array(values, dtype=float)})


def of_samples(version: str, figure: str, value: float, half: float = 0.1, **others: Any) -> Scores:
    figures = {figure: value, f"{figure}_low": value - half, f"{figure}_high": value + half}
    return Scores(version, DIGESTS | MEASURED | figures | others, {})


def test_the_interval_is_that_of_the_paired_z_test() -> None:
    """For many images, where Student's t is normal: the rule then is scipy's paired test at 2.5 %, one-sided."""
    rng = np.random.default_rng(0)
    old = rng.uniform(0.1, 0.5, 5000)
    agreed = set()
    for shift in np.linspace(-0.004, 0.002, 25):
        new = old + rng.normal(shift, 0.05, len(old))
        low, high = (sign * paired(new, old)[1] + paired(new, old)[0] for sign in (-1, 1))
        assert (low, high) == pytest.approx(stats.ttest_rel(new, old).confidence_interval(0.95), rel=1e-3, abs=1e-6)
        p = stats.ttest_rel(new, old, alternative="less").pvalue
        verdict = Better(figure="val_mse").judge(of_images("2", new), of_images("1", old)).verdict
        assert (verdict == "met") == (p < stats.norm.sf(1.96))
        agreed.add(verdict)
    assert agreed == {"met", "not met"}


def test_pairing_cancels_what_images_share() -> None:
    """The errors' spread over images is 100 times their difference, which is the same on all of them."""
    old = np.linspace(0.0, 1.0, 50)
    assert paired(old - 0.003, old) == (pytest.approx(-0.003), pytest.approx(0, abs=1e-12))
    assert paired(np.array([0.1]), np.array([0.2])) == (pytest.approx(-0.1), math.inf)


def test_the_interval_covers_the_difference_of_independent_sets_of_samples() -> None:
    """Differences of independent estimates are in their interval in 95 % of the cases."""
    rng = np.random.default_rng(1)
    new, old = rng.normal(3.0, 0.2, 4000), rng.normal(2.0, 0.5, 4000)
    rows = [
        NotWorse(figure="kid").judge(of_samples("2", "kid", a, 1.96 * 0.2), of_samples("1", "kid", b, 1.96 * 0.5))
        for a, b in zip(new, old, strict=True)
    ]
    covered = np.mean([row.low <= 1.0 <= row.high for row in rows if row.low is not None and row.high is not None])
    assert covered == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 4000) ** 0.5)


@pytest.mark.parametrize(
    ("rule", "figure", "value", "verdict", "words"),
    [
        # The champion has 2.0, and the difference a 95 % interval of ± 0.3.
        ("better", "kid", 1.69, "met", "is below zero"),
        ("better", "kid", 1.71, "not met", "is not below zero by more than the measurement noise"),
        ("better", "kid", 2.5, "not met", "is not below zero by more than the measurement noise"),
        ("better", "recall", 2.31, "met", "is above zero"),
        ("better", "recall", 2.29, "not met", "is not above zero by more than the measurement noise"),
        ("better", "recall", 1.5, "not met", "is not above zero by more than the measurement noise"),
        ("not-worse", "kid", 2.31, "not met", "is above zero"),
        ("not-worse", "kid", 2.29, "met", "is not above zero by more than the measurement noise"),
        ("not-worse", "kid", 0.5, "met", "is not above zero by more than the measurement noise"),
        ("not-worse", "recall", 1.69, "not met", "is below zero"),
        ("not-worse", "recall", 1.71, "met", "is not below zero by more than the measurement noise"),
        ("better 0.2", "kid", 1.49, "met", "is below -0.2"),
        ("better 0.2", "kid", 1.51, "not met", "is not below -0.2 by more than the measurement noise"),
        ("better 0.2", "recall", 2.51, "met", "is above 0.2"),
        ("better 0.2", "recall", 2.49, "not met", "is not above 0.2 by more than the measurement noise"),
        ("not-worse 0.2", "kid", 2.51, "not met", "is above 0.2"),
        ("not-worse 0.2", "kid", 2.49, "met", "is not above 0.2 by more than the measurement noise"),
        ("not-worse 0.2", "recall", 1.49, "not met", "is below -0.2"),
        ("not-worse 0.2", "recall", 1.51, "met", "is not below -0.2 by more than the measurement noise"),
    ],
)
def test_each_rule_in_each_direction(rule: str, figure: str, value: float, verdict: str, words: str) -> None:
    kind, _, by = rule.partition(" ")
    judging = {"better": Better, "not-worse": NotWorse}[kind](figure=figure, by=float(by or 0))
    half = 0.3 / 2**0.5
    row = judging.judge(of_samples("version 2", figure, value, half), of_samples("version 1", figure, 2.0, half))
    assert row.verdict == verdict
    assert row.reason == (
        f"{FIGURES[figure].title} {value:.4f} against 2.0000 of version 1: the difference, {value - 2:+.4g} ± 0.3 "
        f"(95 %, 1,000 samples each), {words}"
    )


@pytest.mark.parametrize(
    ("figure", "limit", "verdict", "reason"),
    [
        ("kid", 2.0, "met", "KID 2.0000 is at most 2"),
        ("kid", 1.9, "not met", "KID 2.0000 is above the limit, 1.9"),
        ("recall", 2.0, "met", "recall 2.0000 is at least 2"),
        ("recall", 2.1, "not met", "recall 2.0000 is below the limit, 2.1"),
    ],
)
def test_a_limit_bounds_from_above_or_from_below(figure: str, limit: float, verdict: str, reason: str) -> None:
    row = Limit(figure=figure, value=limit).judge(of_samples("version 2", figure, 2.0), None)
    assert (row.verdict, row.reason) == (verdict, reason)


def test_the_wider_half_of_an_interval_counts() -> None:
    """That of a distance near zero is cut off below."""
    new = of_samples("version 2", "frechet_distance", 0.5, frechet_distance_low=0.0, frechet_distance_high=2.0)
    row = NotWorse(figure="frechet_distance").judge(new, of_samples("version 1", "frechet_distance", 0.2, 0.0))
    assert (row.low, row.high) == (pytest.approx(0.3 - 1.5), pytest.approx(0.3 + 1.5))


@pytest.mark.parametrize("rule", [Limit(figure="val_mse"), Better(figure="val_mse"), NotWorse(figure="val_mse")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_meets_no_rule(rule: Rule, value: float) -> None:
    good, bad = of_images("version 1", [0.1, 0.2]), of_images("version 2", [0.1, value])
    assert rule.judge(bad, good).reason == f"val MSE of version 2 is {value}"
    assert not rule.judge(bad, good).met
    if not isinstance(rule, Limit):
        assert not rule.judge(good, bad).met


def test_a_single_image_shows_no_difference() -> None:
    new, old = of_images("version 2", [0.1]), of_images("version 1", [0.2])
    assert Better(figure="val_mse").judge(new, old).verdict == "not met"
    assert NotWorse(figure="val_mse").judge(old, new).verdict == "met"


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("kid_low", "KID of version 1 has no interval"),
        ("kid", "KID of version 1 was not measured"),
        ("quality_images", "KID is not comparable: quality_images is none for version 1, 1000 for version 2"),
        (
            "frechet_distance_heldout",
            "KID is not comparable: frechet_distance_heldout is none for version 1, 0.75 for version 2",
        ),
    ],
)
def test_what_is_missing_is_named(missing: str, reason: str) -> None:
    whole = of_samples("version 2", "kid", 2.0)
    old = {key: value for key, value in of_samples("version 1", "kid", 2.0).report.items() if key != missing}
    row = Better(figure="kid").judge(whole, Scores("version 1", old, {}))
    assert (row.verdict, row.difference) == ("not comparable", None)
    assert row.reason.startswith(reason)
    both = Better(figure="kid").judge(Scores("version 2", old, {}), Scores("version 1", old, {}))
    assert both.verdict == "not comparable"  # what neither has is not the same


def test_all_rules_must_be_met() -> None:
    old = of_images("version 1", [0.4, 0.5, 0.6])
    new = of_images("version 2", [0.3, 0.41, 0.5])
    rules = [Limit(figure="val_mse", value=0.5), Better(figure="val_mse")]
    assert decide(rules, new, old).promoted
    refused = decide([*rules, Better(figure="val_mse", by=0.2), Better(figure="kid")], new, old)
    assert not refused.promoted
    assert [row.verdict for row in refused.rows] == ["met", "met", "not met", "not comparable"]
    assert refused.reason == "; ".join(row.reason for row in refused.rows[2:])


def test_the_first_version_needs_to_meet_the_limits_alone() -> None:
    new = of_images("version 1", [0.4, 0.5])
    first = decide([Limit(figure="val_mse", value=0.45), Better(figure="kid")], new, None)
    assert (first.promoted, first.reason) == (True, "the first version; val MSE 0.4500 is at most 0.45")
    assert not decide([Limit(figure="val_mse", value=0.44), Better(figure="kid")], new, None).promoted
    assert not decide([Limit(figure="kid", value=1.0)], new, None).promoted


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            [{"kind": "limit", "figure": "fid", "value": 1.0}],
            r"gate.0.figure: input should be 'val_mse', 'bits_per_dim'",
        ),
        ([{"kind": "best", "figure": "kid"}], r"gate.0.kind: input should be 'limit', 'better' or 'not-worse'"),
        ([{"kind": "better", "figure": "kid", "by": -1.0}], r"gate.0.by: input should be greater than or equal to 0"),
        ([{"kind": "better", "figure": "kid"}], r"gate.0.by: missing$"),  # no command adds it
        (
            [{"kind": "better", "figure": "kid", "value": 1.0, "by": 0}],
            r"gate.0.value: no such parameter of better \(got 1.0\)$",
        ),
        ([{"figure": "kid"}], r"gate.0.kind: missing$"),
        ({"kind": "better"}, r"gate: must be a list"),
    ],
)
def test_wrong_rules_are_refused(gate: Any, message: str) -> None:
    document = lay_over(yaml_files.read_yaml(ROOT / "params.yaml"), {"tracking": {"gate": gate}})
    with pytest.raises(UserError, match=f"^params.yaml: tracking.{message}"):
        parameters.validate(document, "params.yaml")


def test_the_description_of_the_parameter_names_all_figures_and_their_fields() -> None:
    description = " ".join((parameters.Tracking.model_fields["gate"].description or "").split())
    assert description.split("Figures: ")[1].rstrip(".").split(", ") == list(FIGURES)
    assert Params().tracking.gate == (Limit(figure="val_mse", value=0.5), Better(figure="val_mse", by=0.0))


def test_students_keep_the_rules_on_samples() -> None:
    limit, recall = Limit(figure="kid", value=0.1), Better(figure="recall")
    errors = Limit(figure="val_mse"), Better(figure="val_mse"), NotWorse(figure="bits_per_dim")
    assert for_students([errors[0], limit, *errors[1:], recall]) == (limit, recall)
    assert for_students(errors) == for_students([]) == (NotWorse(figure="frechet_distance"),)
