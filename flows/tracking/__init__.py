"""MLflow: one run for each set of results, and a version of the registered model for each exported model.

MLflow only remembers: no stage's output depends on it, and a stage whose server is away goes on after one line that
says so. Everything logged but speeds is read from files that the stages wrote, so that `ddpm track` can bring it
later.

A set of results is parameters, data and weights, and the files that evaluate and export made of them. Each has a run
of its own, which is only ever added to, and is found again by digests of these (see `recording._run_of`): the same
results make no second run and change nothing in the first. What the code was makes no difference, as long as it wrote
the same files. A training is followed in its run before there are weights; that one is found by its id, which the
checkpoint holds, or by the training's fingerprint. A run whose weights were trained in another one names their logged
model as its input, repeats the training's final figures, and has the tag `ddpm.trained_in_run`.

The store is MLFLOW_TRACKING_URI, or else the sqlite file .ddpm/mlflow.db with its artifacts beside it. A server may
share that store, so that its pages show what was logged with and without it, when started with the same two places:

    mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:////ABSOLUTE/.ddpm/mlflow.db
        --default-artifact-root /ABSOLUTE/.ddpm/mlflow-artifacts
"""

from flows.tracking.champion import promote
from flows.tracking.live import LiveRun, live
from flows.tracking.recording import Recorded, record, track

__all__ = ["LiveRun", "Recorded", "live", "promote", "record", "track"]
