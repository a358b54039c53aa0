"""Faults of a team's servers and workers, on the processes of deploy/team/stack.py.

Each is injected while a run trains, on servers and workers that are otherwise well.
"""

import base64
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from deploy.faults.case import Case, Seen
from deploy.faults.clone import ROOT, Clone, ddpm
from deploy.team.rehearse import DEPLOY, RUN, SMALL
from deploy.team.stack import Failed, Team, run, team

LENGTH = {"steps": 150, "preview_every": 25}
SAME = "the weights have the same bytes as without a fault"
SETTINGS = {"DDPM_CHECKPOINT_SECONDS": "0"}
"""Of the workers."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POINTS = """
import mlflow, sys
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("ddpm").experiment_id
(found,) = client.search_runs([experiment], f"attributes.run_name = '{sys.argv[1]}'")
points = client.get_metric_history(found.info.run_id, "curves/heldout_mse")
print(*(point.step for point in sorted(points, key=lambda point: point.timestamp)))
"""


class Trial:
    """One run on the stack, and what is asked of the servers about it."""

    def __init__(self, found: Team, user: Path, number: int, weights: dict[str, str]) -> None:
        self.team, self.user, self.name, self.weights = found, user, f"run{number}", weights
        self.environment = found.environment("worker", found.folder / "user-home")
        self.log_every = 10 + number  # so that no run is in DVC's cache; it changes no weight
        self.seen = 0

    def do(self, *command: str, cwd: Path | None = None) -> str:
        return run(command, cwd=cwd or self.user, env=self.environment)

    def start(self, name: str = "") -> None:
        """Start the run, or the same under another name."""
        train = LENGTH | {"log_every": self.log_every}
        self.seen = len(self.log())
        self.do(*RUN, "train-ddpm/train-ddpm", "--flow-run-name", name or self.name, "-p", f"train={json.dumps(train)}")

    def log(self) -> str:
        return (self.team.folder / "worker.log").read_text(errors="replace")

    def news(self) -> str:
        """What the worker has logged since the run was started."""
        return self.log()[self.seen :]

    def until_it_trains(self) -> None:
        self.team.until("it trains", lambda: re.search(r"step \d+: held-out MSE", self.news()) is not None, "worker")

    def state(self, name: str = "") -> str:
        body = json.dumps({"flow_runs": {"name": {"any_": [name or self.name]}}}).encode()
        user = f"ddpm:{self.team.given['PREFECT_PASSWORD']}".encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {base64.b64encode(user).decode()}"}
        url = f"http://127.0.0.1:{self.team.ports['prefect']}/api/flow_runs/filter"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as answer:
                return str(json.load(answer)[0]["state_type"])
        except OSError:
            return ""

    def until_it_ends(self, name: str = "") -> str:
        self.team.until("it ended", lambda: self.state(name) in ENDED, "worker")
        return self.state(name)

    @property
    def workspace(self) -> Path:
        return self.workspace_of()

    def workspace_of(self, name: str = "") -> Path:
        (found,) = self.team.folder.glob(f"worker*/ddpm-*/.ddpm/runs/{name or self.name}")
        return found

    def check_weights(self, name: str = "") -> None:
        """Raise Failed unless the weights are those of a training without faults."""
        self.must(
            "the weights have the same bytes as without a fault", weights(self.workspace_of(name)) == self.weights
        )

    def must(self, what: str, holds: bool) -> None:
        if not holds:
            raise Failed(f"{self.name}: not so: {what}; the worker's log ends with: {self.team.last_line('worker')}")

    def restart(self, name: str) -> None:
        """Kill a server with all its processes, wait ten seconds, and start it again."""
        process = self.team.processes[name]
        self.kill(process.pid)
        process.wait()
        time.sleep(10)
        self.team.start(name)

    @staticmethod
    def kill(pid: int) -> None:
        """SIGKILL to a process and all its children."""
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def check_points(self) -> int:
        """Raise Failed unless MLflow has the whole curve of held-out errors, in order of time; returns its number."""
        rows = (self.workspace / "reports/train_curves/heldout.csv").read_text().splitlines()
        steps = [row.split(",")[rows[0].split(",").index("step")] for row in rows[1:]]
        points = self.do(sys.executable, "-c", POINTS, self.name).split()
        self.must(f"MLflow has the points {steps}; it has {points}", points == steps)
        return len(steps)


def mlflow_dies(trial: Trial) -> Seen:
    trial.start()
    trial.until_it_trains()
    trial.kill(trial.team.processes["mlflow"].pid)
    trial.must("the run completes", trial.until_it_ends() == "COMPLETED")
    warned = "MLflow: " in trial.news()
    trial.must("the log says that MLflow is gone", warned and "not in MLflow" in trial.news())
    trial.team.start("mlflow")
    trial.team.wait("mlflow", f"http://127.0.0.1:{trial.team.ports['mlflow']}/health")
    clone = trial.workspace.parents[2]
    trial.do("ddpm", "track", trial.name, cwd=clone)
    count = trial.check_points()
    trial.check_weights()
    return Seen(
        1,
        f"the run completes, with a warning; `ddpm track` records it later: {count} of {count} points, in order; "
        f"{SAME}",
    )


def restarts(server: str, trial: Trial) -> Seen:
    trial.start()
    trial.until_it_trains()
    trial.restart(server)
    trial.must("the run completes", trial.until_it_ends() == "COMPLETED")
    count = trial.check_points()
    trial.check_weights()
    return Seen(1, f"the run completes; MLflow has {count} of {count} points, in order; {SAME}")


def store_refuses(trial: Trial) -> Seen:
    trial.start()
    trial.until_it_trains()
    trial.kill(trial.team.processes["s3"].pid)
    trial.must("the run completes", trial.until_it_ends() == "COMPLETED")
    trial.must("the log says what was not pushed", "not pushed (" in trial.news())
    trial.team.start("s3")
    trial.team.wait("s3", f"http://127.0.0.1:{trial.team.ports['s3']}/")
    trial.team.start("bucket")  # moto's server keeps its objects in memory
    trial.team.processes.pop("bucket").wait()
    trial.do("dvc", "push", "--run-cache", cwd=trial.workspace)
    trial.must("nothing is left to push", "up to date" in trial.do("dvc", "push", cwd=trial.workspace))
    trial.check_weights()
    return Seen(
        1,
        "the run completes, with a warning that names folder and command; `dvc push --run-cache` there pushes all; "
        f"{SAME}",
    )


def flow_dies(trial: Trial) -> Seen:
    trial.start()
    trial.until_it_trains()
    worker = psutil.Process(trial.team.processes["worker"].pid)
    (engine, *_) = [child for child in worker.children(recursive=True) if "prefect" in " ".join(child.cmdline())]
    engine.kill()
    state = trial.until_it_ends()
    trial.must("the run is marked as crashed", state == "CRASHED")
    return _goes_on(trial, "the worker marks the run as crashed")


def training_dies(trial: Trial) -> Seen:
    trial.start()
    trial.until_it_trains()
    worker = psutil.Process(trial.team.processes["worker"].pid)
    (train,) = [child for child in worker.children(recursive=True) if child.cmdline()[-3:] == ["-m", "flows", "train"]]
    train.kill()
    trial.must("the run fails", trial.until_it_ends() == "FAILED")
    return _goes_on(trial, "the run fails, and says why")


def _goes_on(trial: Trial, seen: str) -> Seen:
    trial.start("again-" + trial.name)
    trial.must("the run completes", trial.until_it_ends("again-" + trial.name) == "COMPLETED")
    found = re.search(r"resuming from step (\d+)", trial.news())
    trial.must("it goes on from its checkpoint", found is not None and int(found[1]) >= 25)
    trial.check_weights("again-" + trial.name)
    step = found[1] if found else ""
    return Seen(1, f"{seen}; the same parameters continue from the checkpoint of step {step}; {SAME}")


def two_workers(trial: Trial) -> Seen:
    other, services = "worker-two", trial.team.compose["services"]
    services[other] = services["worker"]
    trial.team.start(other, settings=SETTINGS)
    log = trial.team.folder / f"{other}.log"
    trial.team.until("a second worker started", lambda: "started!" in log.read_text(errors="replace"), other)
    try:
        trial.start()
        trial.must("the run completes", trial.until_it_ends() == "COMPLETED")
    finally:
        process = trial.team.processes.pop(other)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    count = trial.check_points()  # there is one workspace
    trial.check_weights()
    return Seen(
        1, f"one of them runs it, once: one workspace, one run in MLflow with {count} of {count} points; {SAME}"
    )


CASES = {
    "mlflow-gone": Case("MLflow's server is killed while a run trains, and stays away", mlflow_dies),
    "mlflow": Case("MLflow's server is killed while a run trains, and returns after 10 s", partial(restarts, "mlflow")),
    "prefect": Case(
        "Prefect's server is killed while a run trains, and returns after 10 s", partial(restarts, "prefect")
    ),
    "postgres": Case("PostgreSQL is killed while a run trains, and returns after 10 s", partial(restarts, "postgres")),
    "two-workers": Case("Two workers of one pool wait for the same run", two_workers),
    "store": Case("The store of the DVC remote refuses connections when a run ends", store_refuses),
    "flow": Case("The flow's process is killed (SIGKILL)", flow_dies),
    "training": Case("The training is killed (SIGKILL)", training_dies),
}


@contextlib.contextmanager
def trials() -> Iterator[Callable[[int], Trial]]:
    """Servers and a worker for a block; gives what makes the run for the fault of a number."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, team(Path(folder)) as found:
        user = prepared(found)
        yield partial(_trial, found, user, reference(user))


def _trial(found: Team, user: Path, wanted: dict[str, str], number: int) -> Trial:
    return Trial(found, user, number, wanted)


def reference(user: Path) -> dict[str, str]:
    """The weights of a training without faults."""
    clone = Clone(user.with_name("reference"))
    run(["git", "clone", "--quiet", f"file://{user}", str(clone.path)])
    clone.do(*ddpm("set", *(f"train.{name}={value}" for name, value in LENGTH.items())))
    for stage in ("shard", "pairs", "train"):
        clone.do(*ddpm(stage))
    return weights(clone.path)


def weights(tree: Path) -> dict[str, str]:
    return Clone(tree).digests("models/ddpm")


def prepared(found: Team) -> Path:
    """A user's clone, deployed, and a worker."""
    folder = found.folder
    origin, user = folder / "origin.git", folder / "user"
    (folder / "user-home").mkdir()
    environment = found.environment("worker", folder / "user-home")

    def do(*command: str) -> str:
        return run(command, cwd=user if user.exists() else folder, env=environment)

    do("git", "clone", "--quiet", "--bare", str(ROOT), str(origin))
    do("git", "clone", "--quiet", f"file://{origin}", str(user))
    for name, value in (("user.name", "A user"), ("user.email", "user@example.org")):
        do("git", "config", "--global", name, value)
    do("dvc", "remote", "add", "--default", "storage", "s3://ddpm/dvc")
    do("ddpm", "set", *SMALL.split())
    do("git", "commit", "--quiet", "--all", "--message", "A small model")
    do("git", "push", "--quiet")
    for pool in ("ddpm", "ddpm-gpu"):
        do("prefect", "work-pool", "create", pool, "--type", "process")
    do(*DEPLOY)
    found.start("worker", settings=SETTINGS)
    return user
