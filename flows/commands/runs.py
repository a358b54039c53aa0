"""`ddpm track` and `ddpm promote`: results and models in MLflow."""

from flows import tracking, workspace
from flows.params import load
from flows.paths import Paths


def track(run: str | None = None, /, *, json: bool = False) -> None:
    """Record results in MLflow that are not there yet.

    Args:
        run: Name of a flow run (see `ddpm runs`); by default the working tree.
        json: Print run id, address and model version as JSON.
    """
    paths = Paths(workspace.find(run)) if run else Paths()
    tracking.track(load(paths.params), paths, as_json=json)


def promote(version: str, /, *, reason: str) -> None:
    """Make a registered model version the champion.

    Args:
        version: Its number in MLflow.
        reason: Why; it is added to the version's description.
    """
    paths = Paths()
    tracking.promote(load(paths.params), paths, version, reason)
