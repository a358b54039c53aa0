"""The comparison of a sweep's trials."""

import json
from collections.abc import Sequence

from diffusion.errors import UserError, counted
from flows.gate import FIGURES, NotComparable, Scores
from flows.paths import Paths
from flows.sweep.study import REASON, Result
from flows.tracking.results import values_by_image

MOST_NAMED = 5
"""How many failed trials the conclusion names; the table has all of them."""


def markdown(name: str, objective: str, results: Sequence[Result], trials: int) -> str:
    """The trials begun so far as a page for Prefect's UI, the best first.

    The interval of the difference from the best trial is that of the gate (`flows.gate`): it covers the noise of the
    measurement, not that between trainings with different seeds.
    """
    parts = [f"# Sweep {name}", conclusion(objective, results, trials), table(objective, results)]
    if any(each.state == "completed" for each in results):
        parts.append(
            "Differences are from the best trial, with 95 % intervals of the measurement; trainings with other seeds "
            "differ further."
        )
    return "\n\n".join(parts)


def conclusion(objective: str, results: Sequence[Result], trials: int) -> str:
    """How many of the `trials` are completed or pruned, the best one, and which failed."""
    completed = [each for each in results if each.state == "completed"]
    parts = [f"{len(completed)} of {counted(trials, 'trial')} completed"]
    if pruned := sum(each.state == "pruned" for each in results):
        parts[0] += f", {pruned} pruned"
    if completed:
        best = completed[0]
        values = ", ".join(f"{name}: {json.dumps(value)}" for name, value in best.values.items())
        parts.append(f"best: {best.name} ({values}), {FIGURES[objective].title} {best.value:.4f}")
    if failed := [each for each in results if each.state == "failed"]:
        named = [f"{each.name} ({each.facts.get(REASON, 'stopped')})" for each in failed[:MOST_NAMED]]
        more = [f"and {len(failed) - MOST_NAMED} more"] if len(failed) > MOST_NAMED else []
        parts.append("failed: " + ", ".join(named + more))
    return "; ".join(parts)


def table(objective: str, results: Sequence[Result]) -> str:
    """A markdown table with a row for each trial."""
    figure = FIGURES[objective]
    names = list(results[0].values) if results else []
    rows = [["trial", *names, figure.title, "95 % interval", "from the best", "state", "seconds"]]
    rows.append(["---"] * len(rows[0]))
    best = _scores(results[0].facts["run"]) if results and results[0].state == "completed" else None
    for position, each in enumerate(results):
        facts = each.facts
        shown = [each.name, *(json.dumps(each.values[name]) for name in names), "", "", "", each.state, ""]
        if each.value is not None:
            new = _scores(facts["run"]) if position else None
            shown[0] = f"[{facts['run']}]({facts['mlflow']})" if facts["mlflow"] else facts["run"]
            interval = f"{facts['low']:.4f} to {facts['high']:.4f}" if facts["low"] is not None else ""
            shown[-5:] = [
                f"{each.value:.4f}",
                interval,
                _difference(objective, new, best) if new and best else "",
                each.state,
                f"{facts['seconds']:.0f}",
            ]
        elif REASON in facts:
            shown[-2] = f"{each.state}: {facts[REASON]}"
        rows.append(shown)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _scores(run: str) -> Scores | None:
    """What evaluate measured in a run; None if its workspace is gone."""
    paths = Paths(Paths().runs / run)
    try:
        report = json.loads(paths.evaluate_report.read_bytes())
        scored = json.loads((paths.evaluation / "scored.json").read_bytes())
        return Scores(run, report | scored, values_by_image(paths.evaluation))
    except (OSError, ValueError, UserError):
        return None


def _difference(objective: str, new: Scores, best: Scores) -> str:
    try:
        value, margin, _ = FIGURES[objective].difference(new, best)
    except NotComparable:
        return "measured on other data"
    told = "" if abs(value) > margin else ", not told apart"
    return f"{value:+.4f} ± {margin:.4f}{told}"
