"""Faults of a team's servers and workers, injected for real: `python -m deploy.team.faults` writes deploy/FAULTS.md.

On the processes of stack.py, each fault is injected while a run trains, on servers and workers that are otherwise well.
The table says what a user sees, and what is lost, as it was measured. A fault by which anything is lost fails the
command.
"""

import argparse
import base64
import contextlib
import json
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from deploy.team.rehearse import DEPLOY, RUN, SMALL
from deploy.team.stack import HERE, Failed, Team, run, said, team

STEPS = 150
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POINTS = """
import mlflow, sys
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("ddpm").experiment_id
(found,) = client.search_runs([experiment], f"attributes.run_name = '{sys.argv[1]}'")
points = client.get_metric_history(found.info.run_id, "curves/heldout_mse")
print(*sorted(point.step for point in points))
"""


class Case(NamedTuple):
    """A fault."""

    fault: str
    inject: Callable[["Trial"], str]
    """Injects it into a run, and returns what the user sees; raises Failed if anything is lost."""


class Trial:
    """One run on the stack, and what is asked of the servers about it."""

    def __init__(self, found: Team, user: Path, number: int) -> None:
        self.team, self.user, self.name = found, user, f"run{number}"
        self.environment = found.environment("worker", found.folder / "user-home")
        self.steps = STEPS + number  # so that no run is in DVC's cache
        self.seen = 0

    def do(self, *command: str, cwd: Path | None = None) -> str:
        return run(command, cwd=cwd or self.user, env=self.environment)

    def start(self, name: str = "") -> None:
        """Start the run, or the same under another name."""
        train = {"steps": self.steps, "preview_every": 25, "log_every": 25}
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
        (found,) = self.team.folder.glob(f"worker/ddpm-*/.ddpm/runs/{self.name}")
        return found

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
        """Raise Failed unless MLflow has the whole curve of held-out errors; returns its number of points."""
        rows = (self.workspace / "reports/train_curves/heldout.csv").read_text().splitlines()
        steps = [row.split(",")[rows[0].split(",").index("step")] for row in rows[1:]]
        points = self.do(sys.executable, "-c", POINTS, self.name).split()
        self.must(f"MLflow has the points {steps}; it has {points}", points == steps)
        return len(steps)


def mlflow_dies(trial: Trial) -> str:
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
    return f"the run completes, with a warning; `ddpm track` records it later: {count} of {count} points"


def restarts(server: str, trial: Trial) -> str:
    trial.start()
    trial.until_it_trains()
    trial.restart(server)
    trial.must("the run completes", trial.until_it_ends() == "COMPLETED")
    count = trial.check_points()
    return f"the run completes; MLflow has {count} of {count} points"


def store_refuses(trial: Trial) -> str:
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
    return "the run completes, with a warning that names folder and command; `dvc push --run-cache` there pushes all"


def flow_dies(trial: Trial) -> str:
    trial.start()
    trial.until_it_trains()
    worker = psutil.Process(trial.team.processes["worker"].pid)
    (engine, *_) = [child for child in worker.children(recursive=True) if "prefect" in " ".join(child.cmdline())]
    engine.kill()
    state = trial.until_it_ends()
    trial.must("the run is marked as crashed", state == "CRASHED")
    return _goes_on(trial, "the worker marks the run as crashed")


def training_dies(trial: Trial) -> str:
    trial.start()
    trial.until_it_trains()
    worker = psutil.Process(trial.team.processes["worker"].pid)
    (train,) = [child for child in worker.children(recursive=True) if child.cmdline()[-3:] == ["-m", "flows", "train"]]
    train.kill()
    trial.must("the run fails", trial.until_it_ends() == "FAILED")
    return _goes_on(trial, "the run fails, and says why")


def _goes_on(trial: Trial, seen: str) -> str:
    trial.start("again-" + trial.name)
    trial.must("the run completes", trial.until_it_ends("again-" + trial.name) == "COMPLETED")
    found = re.search(r"resuming from step (\d+)", trial.news())
    trial.must("it goes on from its checkpoint", found is not None and int(found[1]) >= 25)
    return f"{seen}; the same parameters continue from the checkpoint of step {found[1] if found else ''}"


CASES = {
    "mlflow-gone": Case("MLflow's server is killed while a run trains, and stays away", mlflow_dies),
    "mlflow": Case("MLflow's server is killed while a run trains, and returns after 10 s", partial(restarts, "mlflow")),
    "prefect": Case(
        "Prefect's server is killed while a run trains, and returns after 10 s", partial(restarts, "prefect")
    ),
    "postgres": Case("PostgreSQL is killed while a run trains, and returns after 10 s", partial(restarts, "postgres")),
    "store": Case("The store of the DVC remote refuses connections when a run ends", store_refuses),
    "flow": Case("The flow's process is killed (SIGKILL)", flow_dies),
    "training": Case("The training is killed (SIGKILL)", training_dies),
}
HEAD = """# Faults

What happens when a part dies while a run trains. Made by `python -m deploy.team.faults`, which injects each fault for
real. It checks, as far as the fault concerns them, that the run completes or continues from its checkpoint, that MLflow
has every point of the curve of held-out errors, and that all results can be pushed.

| fault | what the user sees | lost |
|---|---|---|
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = list(CASES)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="faults to inject, without writing the file"
    )
    only = parser.parse_args(argv).only
    rows = list[str]()
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, team(Path(folder)) as found:
            user = prepared(found)
            for number, (name, case) in enumerate(CASES.items()):
                if name in only:
                    said(case.fault)
                    rows.append(f"| {case.fault} | {case.inject(Trial(found, user, number))} | nothing |\n")
                    said(rows[-1].strip())
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    if only == names:
        (HERE.parent / "FAULTS.md").write_text(HEAD + "".join(rows))
    return 0


def prepared(found: Team) -> Path:
    """A user's clone, deployed, and a worker."""
    folder = found.folder
    origin, user = folder / "origin.git", folder / "user"
    (folder / "user-home").mkdir()
    environment = found.environment("worker", folder / "user-home")

    def do(*command: str) -> str:
        return run(command, cwd=user if user.exists() else folder, env=environment)

    do("git", "clone", "--quiet", "--bare", str(HERE.parents[1]), str(origin))
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
    found.start("worker", settings={"DDPM_CHECKPOINT_SECONDS": "0"})
    return user


if __name__ == "__main__":
    sys.exit(main())
