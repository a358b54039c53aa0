"""Addresses of MLflow's pages.

MLflow's own start page is for language models: each address here opens the pages for training.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote, urlencode

from flows import http

TRAINING = {"workflowType": "machine_learning"}
VIEW = "key-figures"
"""Key of the view of the runs table that shows the key figures; by default MLflow shows no metrics there."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Tag of an experiment, in which MLflow looks for the view that an address names."""
COLUMNS = {
    "metrics.`evaluate/mse`": 120,
    "metrics.`evaluate/r2`": 100,
    "metrics.`evaluate/bits_per_dim`": 180,
    "metrics.`evaluate/val_mse`": 150,
    "metrics.`curves/heldout_mse`": 170,
    "params.`shard.source`": 180,
    "params.`network.kind`": 120,
    "params.`trained.steps`": 120,
    "attributes.`Source`": 100,
}
"""The view's columns, with their widths in pixels."""


def experiments(server: str) -> str:
    """The list of experiments."""
    return _page(server, "experiments")


def runs(server: str, experiment_id: str) -> str:
    """An experiment's runs table, with the key figures."""
    return _page(server, f"experiments/{experiment_id}/runs", {"viewStateShareKey": VIEW})


def runs_of(server: str, experiment: str) -> str:
    """The runs table of the experiment with this name; the list of experiments if the server has none (yet)."""
    asked = f"{server.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?{urlencode({'experiment_name': experiment})}"
    found: Any = http.json(asked)
    return runs(server, found["experiment"]["experiment_id"]) if found else experiments(server)


def run(server: str, experiment_id: str, run_id: str) -> str:
    """A run."""
    return _page(server, f"experiments/{experiment_id}/runs/{run_id}")


def artifact(server: str, experiment_id: str, run_id: str, file: str) -> str:
    """A file of a run."""
    return _page(server, f"experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(file)}")


def model(server: str, name: str) -> str:
    """A registered model, with its versions."""
    return _page(server, f"models/{quote(name, safe='')}")


def version(server: str, name: str, number: str) -> str:
    """A version of a registered model."""
    return _page(server, f"models/{quote(name, safe='')}/versions/{number}")


def view() -> str:
    """The value of VIEW_TAG, as MLflow writes it when a user saves a view of the table."""
    state = {"selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": COLUMNS}
    return json.dumps({"name": "Key figures", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _page(server: str, path: str, query: dict[str, str] | None = None) -> str:
    return f"{server.rstrip('/')}/#/{path}?{urlencode(TRAINING | (query or {}))}"
