"""What DVC, MLflow and Prefect cost by the number of files, points, runs and lines."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from growing.isolated import cost

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
DVC = [sys.executable, "-m", "dvc"]
PARAMETERS, METRICS = 150, 60
"""Of a run, about."""
FLOW = """
import json, sqlite3, sys, time
from prefect import flow, get_run_logger, task

@task
def stage(lines):
    for number in range(lines):
        get_run_logger().info("train: %s/800000 steps, 5.2/s, 151384 s left, loss 0.0312", number)

@flow
def stages(lines):
    for _ in range(5):
        stage(lines)

def size(database):
    time.sleep(6)  # the server writes logs and events a little later
    with sqlite3.connect(database) as connection:
        pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return pages * size

if __name__ == "__main__":
    database, runs, lines = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    stages(0)  # makes the tables
    sizes = [size(database)]
    for _ in range(runs):
        stages(0)
    sizes.append(size(database))
    stages(lines)
    print(json.dumps([*sizes, size(database)]))
"""


def dvc(folder: Path, files: int) -> Row:
    """Seconds of DVC's commands for a folder of small files, and the bytes of its list of them."""
    folder.mkdir()
    for command in (
        "git init",
        f"{sys.executable} -m dvc init",
        f"{sys.executable} -m dvc remote add -d near ../remote",
    ):
        subprocess.run(f"{command} --quiet", shell=True, cwd=folder, check=True)
    data = folder / "data"
    data.mkdir()
    for number in range(files):
        (data / f"{number:07d}").write_bytes(b"%d" % number)
    found: Row = {"files": files}
    for name, command in {
        "add": "add data", "status": "status", "push": "push", "checkout": "checkout data.dvc",
    }.items():  # fmt: skip
        if name == "checkout":
            shutil.rmtree(data)
        seconds = []
        for _ in range(3 if name == "status" else 1):  # the others change what they find
            began = time.perf_counter()
            subprocess.run([*DVC, *command.split(), "--quiet"], cwd=folder, check=True)
            seconds.append(time.perf_counter() - began)
        found[f"{name}_s"] = statistics.median(seconds)
    (listed,) = folder.glob(".dvc/cache/files/md5/*/*.dir")
    return found | {"dir_bytes": listed.stat().st_size}


def mlflow_points(folder: Path, points: int) -> Row:
    """Logging the points of one run in batches of 1,000, as the stage does, into SQLite."""
    from mlflow.entities import Metric

    client, database = _client(folder)
    run = client.create_run("0").info.run_id
    before = database.stat().st_size

    def log() -> None:
        for step in range(0, points, 1000):
            batch = [Metric(f"loss_{number % 15}", 0.5, step, step + number // 15) for number in range(1000)]
            client.log_batch(run, metrics=batch)

    _, logging = cost(log)
    _, reading = cost(lambda: client.get_metric_history(run, "loss_0"))
    return {
        "points": points,
        "points_per_s": points / logging.wall_s,
        "bytes_per_point": (database.stat().st_size - before) / points,
        "read_us": 1e6 * reading.wall_s / (points / 15),
    }


def mlflow_runs(folder: Path, runs: int) -> Row:
    """Runs with their parameters, metrics and tags, and the search for one by its tag."""
    from mlflow.entities import Metric, Param, RunTag

    client, database = _client(folder)
    before = database.stat().st_size

    def create() -> None:
        for number in range(runs):
            client.log_batch(
                client.create_run("0").info.run_id,
                metrics=[Metric(f"metric_{index}", 0.5, 0, 0) for index in range(METRICS)],
                params=[Param(f"section.parameter_{index}", "value") for index in range(PARAMETERS)],
                tags=[RunTag("mlflow.ddpm.fingerprint", f"{number}")],
            )

    _, creating = cost(create)
    _, searching = cost(lambda: client.search_runs(["0"], "tags.`mlflow.ddpm.fingerprint` = '1'"))
    return {
        "runs": runs,
        "create_s": creating.wall_s / runs,
        "bytes_per_run": (database.stat().st_size - before) / runs,
        "search_s": searching.wall_s,
    }


def points_of_a_training(name: str) -> Row:
    """The number of points that the stage `train` logs: of the loss, with two rates, and of the held-out error."""
    from diffusion.training.curves import band_columns
    from flows import presets

    params = presets.load(ROOT / "presets" / f"{name}.yaml")
    steps, columns = params.train.steps, 5 + len(band_columns(params.process.num_timesteps))
    points = steps // params.train.log_every * columns + steps // params.train.preview_every * 3
    return {"preset": name, "steps": steps, "points": points}


def _client(folder: Path) -> tuple[Any, Path]:
    from mlflow import MlflowClient

    folder.mkdir()
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.search_experiments()  # creates the tables
    return client, folder / "mlflow.db"


def prefect(folder: Path, runs: int, lines: int) -> Row:
    """Bytes in Prefect's database for a run of five tasks, and for a line of its log."""
    folder.mkdir()
    (folder / "flow.py").write_text(FLOW)
    environment = os.environ | {"PREFECT_HOME": str(folder), "DO_NOT_TRACK": "1"}
    environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "300"
    environment.pop("PREFECT_API_URL", None)  # a server of its own
    done = subprocess.run(
        [sys.executable, "flow.py", "prefect.db", str(runs), str(lines)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    first, second, third = json.loads(done.stdout.splitlines()[-1])
    run = (second - first) / runs
    line = (third - second - run) / (5 * lines)
    return {"runs": runs, "bytes_per_run": run, "lines": 5 * lines, "bytes_per_line": line}
