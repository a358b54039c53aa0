"""MLflow: one run for each set of results, and a version of the registered model for each exported model.

MLflow only records: no stage's output depends on it, and a stage whose server is unreachable continues after a one-line
message. Everything logged except speeds is read from files that the stages wrote, so that `ddpm track` can record it
later.

A set of results is parameters, data and weights, and the files that evaluate and export made from them. Each set has
one append-only run, identified by digests of these (see `recording._run_of`): recording the same results again makes no
second run and changes nothing in the first. Different code makes no difference as long as it writes the same files. A
training is followed in its run before there are weights; that run is found by its id, which the checkpoint holds, or by
the training's fingerprint. A run that reuses the weights of another one has their logged model as its input, repeats
the training's final figures, and names the other run in its description.

The run of a sweep has the runs of its trials as children, except those that recorded the same results before.

Digests are kept in tags that MLflow's pages hide: see `names`, also for metrics and parameters. `description` writes
what a user reads first.

The store is MLFLOW_TRACKING_URI, or else the sqlite file .ddpm/mlflow.db with its artifacts next to it. A server can
use the same store, and then shows what was logged with and without it; start it with the same two locations:

    mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:////ABSOLUTE/.ddpm/mlflow.db
        --default-artifact-root /ABSOLUTE/.ddpm/mlflow-artifacts
"""

from flows.tracking.champion import promote
from flows.tracking.live import LiveRun, live
from flows.tracking.recording import Recorded, record, track
from flows.tracking.sweeps import record_sweep

__all__ = ["LiveRun", "Recorded", "live", "promote", "record", "record_sweep", "track"]
