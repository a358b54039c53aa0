"""A team's servers and workers on this machine, without containers: the main job on them, from clone to clone.

    python -m deploy.team.rehearse

runs the commands of deploy/team/compose.yaml, with their environments, on ports of their own: PostgreSQL (Debian's
package `postgresql`), an S3 server (moto's, in place of the image), the servers of Prefect and MLflow with passwords,
and two workers with separate homes and folders, which share git, the DVC remote and the servers alone. Then a user
pushes a commit, deploys it, and runs `prefect deployment run train-ddpm`; another worker takes the same results from
the remote; the user fetches and applies the run, distils it, and fetches the best trial of a sweep; a worker is
killed; and a colleague's clone pulls the results and has nothing to run. The model is promoted, and served behind Caddy
(Debian's `caddy`) with TLS. Each step prints what it checked; the first one that fails ends the rehearsal with status
1. Needs `pip install -e '.[team,cluster]' moto[server]`.
"""

import argparse
import contextlib
import http.client
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from deploy.team.stack import HERE, SECONDS, Failed, Team, expect, free_port, output_of, run, said, team

ROOT = Path(__file__).parents[2]
SMALL = (
    "train.steps=20 train.preview_every=10 train.log_every=10 train.batch_size=16 network.base_channels=16 "
    "network.channel_multipliers=[1,2] evaluate.quality_samples=0 evaluate.likelihood_images=8 "
    "evaluate.exact_likelihood_images=2 sample.steps=4 sample.count=8 export.steps=4 export.max_loss=9"
)
"""Changes to params.yaml that make the job take a minute."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work, instead of a temporary folder; kept at the end")
    folder = parser.parse_args().folder
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            rehearse(stack.enter_context(team(folder.resolve())))
        except Failed as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    return 0


def rehearse(found: Team) -> None:
    """The main job, as a user, two workers and a colleague do it."""
    folder = found.folder
    origin, user, colleague = folder / "origin.git", folder / "user", folder / "colleague"
    run(["git", "clone", "--quiet", "--bare", str(ROOT), str(origin)])
    environment = found.environment("worker", _home(folder / "user-home"))
    environment["COLUMNS"] = "200"  # so that tables are not cut

    def do(tree: Path, *command: str) -> str:
        return run(command, cwd=tree, env=environment)

    run(["git", "clone", "--quiet", f"file://{origin}", str(user)])
    for name, value in (("user.name", "A user"), ("user.email", "user@example.org")):
        do(user, "git", "config", "--global", name, value)
    do(user, "dvc", "remote", "add", "--default", "storage", "s3://ddpm/dvc")
    do(user, "ddpm", "set", *SMALL.split())
    do(user, "git", "add", ".dvc/config", "params.yaml")
    do(user, "git", "commit", "--quiet", "--message", "A small model, and the team's storage")
    for pool in ("ddpm", "ddpm-gpu"):
        do(user, "prefect", "work-pool", "create", pool, "--type", "process")
    refused = subprocess.run(DEPLOY, cwd=user, env=environment, capture_output=True, text=True)
    told = " ".join(output_of(refused).split())
    (folder / "refused.log").write_text(output_of(refused))
    expect("a commit that is not pushed is not deployed", refused.returncode != 0 and "not pushed yet" in told)
    do(user, "git", "push", "--quiet")
    do(user, *DEPLOY)
    automation = (HERE / "automations.yaml").read_text().replace("within: 900", "within: 90")  # not to wait so long
    (folder / "automations.yaml").write_text(automation)
    do(user, "prefect", "automation", "create", "--from-file", str(folder / "automations.yaml"))
    said("deployed")

    for pool in ("worker", "worker-gpu"):
        found.start(pool)
    done = do(user, *RUN, "train-ddpm/train-ddpm", "--flow-run-name", "first", "--watch")
    expect("worker `ddpm` ran the five stages", "Flow run finished successfully" in done or "first: done" in done)
    first = _workspace(folder / "worker", "first")
    expect("in a clone of its own", first.is_relative_to(folder / "worker"))
    done = do(user, *RUN, "train-ddpm/gpu", "--flow-run-name", "second", "--watch")
    second = _workspace(folder / "worker-gpu", "second")
    outcomes = {each["outcome"] for each in YAML(typ="safe").load((second / "summary.json").read_text())["stages"]}
    expect("worker `ddpm-gpu`, in another home and folder, took all results from the remote", outcomes == {"cached"})
    model = "models/onnx/sampler.onnx"
    expect("with the same bytes", (first / model).read_bytes() == (second / model).read_bytes())

    do(user, "ddpm", "fetch", "first")
    do(user, "ddpm", "apply", "first")
    expect("the user has the model", (user / model).read_bytes() == (first / model).read_bytes())
    distil = ("distill-ddpm/gpu", "--watch", "-p", "run=first", "--flow-run-name", "student", *STUDENT)
    done = do(user, *RUN, *distil)
    expect("worker `ddpm-gpu` distilled the model of the other's run", "Flow run finished successfully" in done)
    sweep(found, user, environment)
    lose(found, partial(do, user))
    do(user, "dvc", "push")
    do(user, "git", "add", "params.yaml", "dvc.lock")
    do(user, "git", "commit", "--quiet", "--message", "Results")
    do(user, "git", "push", "--quiet")
    run(["git", "clone", "--quiet", f"file://{origin}", str(colleague)])
    do(colleague, "dvc", "pull")
    expect("a colleague who pulls has nothing to run", "are up to date" in do(colleague, "dvc", "repro"))
    expect("and the model", (colleague / model).read_bytes() == (first / model).read_bytes())

    if "champion" not in do(user, "ddpm", "track", "first"):
        do(user, "ddpm", "promote", "1", "--reason", "rehearsal")
    serve(found)
    cluster(found)
    for name in (name for name in found.processes if name != "s3"):  # which is another server here
        found.until(f"{name} is healthy", partial(found.healthy, name), name)


def sweep(found: Team, user: Path, environment: Mapping[str, str]) -> None:
    """A sweep by one worker, which the other one cannot run meanwhile, and finds complete afterwards."""
    log = found.folder / "worker.log"
    run([*RUN, "sweep-ddpm/sweep-ddpm", *SWEEP], cwd=user, env=environment)
    found.until("the sweep runs", lambda: "sweep rates: 0 of 2" in log.read_text(errors="replace"), "worker")
    again = [*RUN, "sweep-ddpm/gpu", "--watch", *SWEEP]
    refused = subprocess.run(again, cwd=user, env=environment, capture_output=True, text=True)
    running = "sweep 'rates' is running on another machine" in " ".join(output_of(refused).split())
    expect("another worker does not run the same sweep", refused.returncode != 0 and running)
    found.until("its first trial is complete", lambda: "rates-0: val MSE" in log.read_text(errors="replace"), "worker")
    whole = "2 of 2 trials completed; best: rates-"
    found.until("the sweep is complete", lambda: whole in log.read_text(errors="replace"), "worker")
    done = run(again, cwd=user, env=environment)
    expect("another worker has nothing left to run of it", whole in done and "rates-0: train." not in done)
    best = done.partition(whole)[2][0]
    run(["ddpm", "fetch", f"rates-{best}"], cwd=user, env=environment)
    model, trial = "models/onnx/sampler.onnx", _workspace(found.folder / "worker", f"rates-{best}")
    same = (user / ".ddpm/runs" / trial.name / model).read_bytes() == (trial / model).read_bytes()
    expect("the user has the model of the best trial", same)


def lose(found: Team, do: Callable[..., str]) -> None:
    """Kill a worker with all that it runs; the run is marked, and goes on from its checkpoint."""
    log, worker = found.folder / "worker-gpu.log", found.processes["worker-gpu"]
    seen = len(log.read_text(errors="replace"))
    do(*RUN, "train-ddpm/gpu", "--flow-run-name", "lost", *LONG)
    found.until("it trains", lambda: ": held-out MSE" in log.read_text(errors="replace")[seen:], "worker-gpu")
    for process in [*psutil.Process(worker.pid).children(recursive=True), worker]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    worker.wait()
    expect("its health check fails", not found.healthy("worker-gpu"))
    found.until("the lost run is marked as crashed", lambda: "CRASHED" in do(*STATES), "prefect")
    seen = len(log.read_text(errors="replace"))
    found.start("worker-gpu")
    do(*RUN, "train-ddpm/gpu", "--flow-run-name", "again", *LONG)
    found.until(
        "started again, it goes on from its checkpoint",
        lambda: "resuming from step" in log.read_text(errors="replace")[seen:],
        "worker-gpu",
    )


def serve(found: Team) -> None:
    """The service, and the proxy with TLS in front of it and of the servers."""
    key = _key(Path(found.given["SERVICE_KEYS"]))
    found.start("service", settings={"PYTHONPATH": str(ROOT)})  # the image's folder has `deploy`
    found.wait("service", f"http://127.0.0.1:{found.ports['service']}/v2/health/ready")
    port, other = free_port(), free_port()
    options = f"{{\n\thttps_port {port}\n\thttp_port {other}\n\tskip_install_trust\n"
    options += f"\tadmin 127.0.0.1:{found.health['proxy']}\n}}\n"
    configuration = found.folder / "Caddyfile"
    configuration.write_text(options + found.here((HERE / "Caddyfile").read_text()))
    data = found.folder / "proxy"
    found.start(
        "proxy",
        ["caddy", "run", "--adapter", "caddyfile", "--config", str(configuration)],
        {"XDG_DATA_HOME": str(data)},
    )
    authority = data / "caddy/pki/authorities/local/root.crt"
    deadline = time.monotonic() + SECONDS
    ask = partial(_over_tls, port, "ddpm.localhost", "/images?n=1", authority)
    while not authority.exists() or (answer := ask(key=key)) is None:
        if found.processes["proxy"].poll() is not None or time.monotonic() > deadline:
            raise Failed(f"proxy did not start: {found.last_line('proxy')}")
        time.sleep(0.3)
    expect("the service draws a picture, over TLS", answer[0] == 200 and answer[1].startswith(b"\x89PNG"))
    expect("but not without a key", (ask() or (0, b""))[0] == 401)
    for host, path in (
        ("prefect.localhost", "/api/flows/filter"),
        ("mlflow.localhost", "/ajax-api/2.0/mlflow/runs/search"),
    ):
        status, _ = _over_tls(port, host, path, authority, method="POST") or (0, b"")
        expect(f"{host} refuses whoever has no password", status == 401)


def _key(folder: Path) -> str:
    """A new key of the service, whose file is in this folder."""
    folder.mkdir()
    with (folder / "keys").open("w") as file:
        command = [sys.executable, "-m", "deploy.service.keys", "rehearsal"]
        return subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True, check=True
        ).stderr.strip()


def _over_tls(
    port: int, host: str, path: str, authority: Path, *, method: str = "GET", key: str = ""
) -> tuple[int, bytes] | None:
    """Status and body of a page's request to the proxy, whose certificate is checked; None if it does not answer."""
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with socket.create_connection(("127.0.0.1", port), 20) as plain:
            connection = http.client.HTTPConnection(host, port, timeout=20)
            connection.sock = context.wrap_socket(plain, server_hostname=host)
            headers = {"Host": host, "Origin": f"https://{host}"}
            connection.request(method, path, headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}))
            answer = connection.getresponse()
            return answer.status, answer.read()
    except OSError:
        return None


def cluster(found: Team) -> None:
    """The Dask cluster: a worker registers at the scheduler."""
    for name in ("dask-scheduler", "dask-worker"):
        found.start(name)
    deadline, log = time.monotonic() + SECONDS, found.folder / "dask-scheduler.log"
    while "Register worker" not in log.read_text(errors="replace"):
        if found.processes["dask-scheduler"].poll() is not None or time.monotonic() > deadline:
            raise Failed(f"no worker registered: {found.last_line('dask-scheduler')}")
        time.sleep(0.3)
    said("ok: a Dask worker registered at the scheduler")


RUN = ("prefect", "deployment", "run")
STUDENT = ("-p", 'distill={"steps": 4, "preview_every": 2, "log_every": 2, "batch_size": 8}')
SWEEP = ("-p", "name=rates", "-p", 'over={"train.learning_rate": [0.003, 0.004]}')
LONG = ("-p", 'train={"steps": 1000000, "decay": "constant", "log_every": 50, "preview_every": 50}')
STATES = ("prefect", "flow-run", "ls", "--state", "CRASHED")
DEPLOY = ("prefect", "--no-prompt", "deploy", "--prefect-file", "deploy/team/prefect.yaml", "--all")


def _workspace(worker: Path, run: str) -> Path:
    found = list(worker.glob(f"ddpm-*/.ddpm/runs/{run}"))
    if len(found) != 1:
        raise Failed(f"{worker}: no workspace of run {run}; its log ends with: {_tail(worker)}")
    return found[0]


def _tail(worker: Path) -> str:
    return " / ".join(worker.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-3:])


def _home(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
