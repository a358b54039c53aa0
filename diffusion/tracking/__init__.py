"""MLflow: one run for each trained set of weights, and a version of the registered model for each exported one.

MLflow only remembers: no stage's output depends on it, and a stage whose server is away goes on after one line that
says so. Everything logged but speeds is read from files that the stages wrote, so that `ddpm track` can bring it
later. A run is found again by its tag `ddpm.weights_sha256` (while training, by its id or the training's
fingerprint), and what was logged is marked with tags `ddpm.logged.PART`: doing anything twice adds nothing.

The store is MLFLOW_TRACKING_URI, or else the sqlite file .ddpm/mlflow.db with its artifacts beside it. A server may
share that store, so that its pages show what was logged with and without it, when started with the same two places:

    mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:////ABSOLUTE/.ddpm/mlflow.db
        --default-artifact-root /ABSOLUTE/.ddpm/mlflow-artifacts
"""

from diffusion.tracking.live import LiveRun, live
from diffusion.tracking.recording import Recorded, record, track

__all__ = ["LiveRun", "Recorded", "live", "record", "track"]
