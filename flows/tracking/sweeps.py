"""Recording a sweep: the run whose children are the runs of its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.params import Params
from flows.paths import Paths
from flows.tracking import description, store
from flows.tracking.starting import of_sweep

TABLE = "trials.json"
"""Artifact of a sweep's run: a table with a row for each trial."""


def record_sweep(
    params: Params,
    paths: Paths,
    name: str,
    settings: Mapping[str, Any],
    best: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    text: str,
) -> None:
    """Record what a sweep has found so far, and mark its run as finished.

    Args:
        params: parameters that its trials share.
        paths: those of the repository.
        name: name of the sweep.
        settings: what it tries.
        best: figures of the best trial; empty if none has completed.
        rows: the trials, with the same keys each.
        text: a description.
    Raises:
        UserError: MLflow cannot be reached.
    """
    uri = store.tracking_uri(paths)
    with store.user_errors(uri), store.lock(paths):
        run = of_sweep(store.connect(uri, params, paths), name)
        run.parameters(settings)
        run.metrics(store.points({f"best/{figure}": value for figure, value in best.items()}, len(rows)))
        if rows:
            store.log_table(run.client, run.id, list(rows[0]), [list(row.values()) for row in rows], TABLE)
        description.write(run.client, run.id, text)
        run.end("FINISHED")
