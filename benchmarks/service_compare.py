"""Load of deploy/service: beside a bare loop of ONNX Runtime, beside MLflow and MLServer, and for ten minutes.

The clients are autocannon's, and MLServer has an environment of its own:

    npm install --prefix .ddpm/serving autocannon@9.0.0
    python3 -m venv .ddpm/serving/mlserver
    .ddpm/serving/mlserver/bin/pip install mlserver==1.7.1 uvloop==0.21.0 onnxruntime==1.31.1
    python benchmarks/service_compare.py digits=DIGITS/models/onnx/sampler.onnx fashion-mnist=...

Every request asks for one image in 10 steps, and each client sends one after another. Clients, service and model share
the processors. The parts:

- load: the service with 1, 8, 64 and 512 clients, which ask for tensors in JSON, binary tensors, or a PNG; before and
  after, the same file in a bare loop, with the number of threads, of runs at once, and of images in each that is
  fastest.
- compare: the service, `mlflow models serve` and MLServer get the same inference in JSON, and return all outputs. They
  take turns, each time in new processes.
- soak: memory of the service under mixed requests, of which some are invalid.

A run is first warmed up, for a third of its time. It lasts `--seconds`, or as long as three requests of each client
take; if that is more than `--longest`, it is left out. Each part replaces its results in
benchmarks/results/service.json.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from portable import processor
from serving import servers, tables
from serving.servers import Request, Running, Server

sys.path.insert(0, str(Path(__file__).parents[1]))  # in case the project is not installed

from diffusion.storage.files import write_atomic

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "service.json"
CLIENTS = (1, 8, 64, 512)
BATCHES = (1, 8, 32, 64)
BARE_SECONDS = 0.7
SETTLING = 2
"""Minutes of the soak after which memory must not grow any more."""
SOAK_CLIENTS = 16
SAMPLE_SECONDS = 5.0
PARTS = ("load", "compare", "soak")
BUSY = 0.5
"""Load average beyond which other work disturbs the measurements."""
OURS = Server("deploy/service", servers.service, "/v2/health/ready", servers.inference)


def others(tools: Path) -> list[Server]:
    """MLflow and MLServer, each with processes for the cores, and with threads for them."""
    cores, found = os.cpu_count() or 1, list[Server]()
    for workers, threads in ((1, cores), (cores, 1)):
        name = f"mlflow, workers: {workers}, threads: {threads}"
        found.append(Server(name, servers.mlflow(workers, threads), "/ping", servers.invocation))
    for workers, threads in ((0, cores), (cores, 1)):
        name = f"mlserver, parallel_workers: {workers}, threads: {threads}"
        start, ready = servers.mlserver(mlserver(tools), workers, threads), "/v2/models/ddpm/ready"
        found.append(Server(name, start, ready, servers.inference))
    return found


def mlserver(tools: Path) -> Path:
    return tools / "mlserver" / "bin" / "mlserver"


class Clients:
    """Runs the clients, and watches the server meanwhile."""

    def __init__(self, tools: Path, seconds: float, longest: float) -> None:
        self.seconds, self.longest = seconds, longest
        self._environment = {**os.environ, "NODE_PATH": str(tools.resolve() / "node_modules")}

    def start(self, url: str, requests: list[Request], clients: int, seconds: float, shared: bool) -> Any:
        """Start them; they print their result."""
        told = {"url": url, "requests": [each.told() for each in requests], "clients": clients, "seconds": seconds}
        told |= {"warm": seconds / 3, "shared": shared}
        process = subprocess.Popen(
            ["node", str(ROOT / "benchmarks/serving/clients.js")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment,
        )  # fmt: skip
        assert process.stdin
        process.stdin.write(json.dumps(told))
        process.stdin.close()
        process.stdin = None
        return process

    def run(self, running: Running, request: Request, clients: int, rate: float, shared: bool = False) -> Any:
        """Requests per second, latency, outcomes, processor time and memory; None if it would last too long.

        rate: requests per second with fewer clients; 0 if unknown.
        """
        seconds = max(self.seconds, 3 * clients / rate if rate else 0)
        if seconds > max(self.longest, self.seconds):
            return None
        cpu, began, memory = running.cpu(), time.perf_counter(), 0.0
        process = self.start(running.url, [request], clients, seconds, shared)
        while process.poll() is None:
            memory = max(memory, running.memory())
            time.sleep(0.5)
        found: dict[str, Any] = json.loads(process.stdout.read())
        found["server_cpu"] = (running.cpu() - cpu) / (time.perf_counter() - began)
        return {"clients": clients, "shared": shared, "memory_mib": memory} | found

    def series(self, running: Running, request: Request, clients: Iterable[int]) -> list[dict[str, Any]]:
        """More and more clients, as far as there is time."""
        found, rate = list[dict[str, Any]](), 0.0
        for count in clients:
            if not (each := self.run(running, request, count, rate)):
                break
            rate = each["requests_per_second"]
            found.append(each)
            said(each)
        return found


def bare(model: Path) -> list[dict[str, Any]]:
    """Images per second of the file in ONNX Runtime alone, in a process of its own."""
    command = [sys.executable, __file__, "--bare", f"model={model}"]
    found: list[dict[str, Any]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    said(max(found, key=lambda each: float(each["images_per_second"])))
    return found


def loop(model: Path) -> list[dict[str, Any]]:
    import onnxruntime as ort

    cores, found = os.cpu_count() or 1, []
    for threads, at_once in sorted({(1, 1), (cores, 1), (1, cores)}):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(model, options)
        for batch in BATCHES:
            value = np.random.default_rng(0).standard_normal((batch, *session.get_inputs()[0].shape[1:]), np.float32)
            feeds = {"noise": value, "steps": np.array([servers.STEPS])}
            session.run(None, feeds)
            with ThreadPoolExecutor(at_once) as pool:
                rate = sum(pool.map(run_repeatedly, [session] * at_once, [feeds] * at_once)) * batch
            found.append({"threads": threads, "at_once": at_once, "batch": batch, "images_per_second": rate})
    return found


def run_repeatedly(session: Any, feeds: dict[str, Any]) -> float:
    """Runs per second."""
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < BARE_SECONDS:
        session.run(None, feeds)
        count += 1
    return count / elapsed


def shape_of(model: Path) -> tuple[int, ...]:
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    if (names := [each.name for each in session.get_inputs()]) != ["noise", "steps"]:
        sys.exit(
            f"{model}: has the inputs {', '.join(names)}; choose a model without classes and a deterministic sampler"
        )
    return tuple(session.get_inputs()[0].shape[1:])


def load(model: Path, clients: Clients) -> dict[str, Any]:
    shape = shape_of(model)
    kinds = {"JSON": servers.inference(shape), "binary": servers.binary(shape), "PNG": servers.picture()}
    found: dict[str, Any] = {"bare": [bare(model)], "kinds": {}, "left_out": {}}
    with OURS.running(model) as running:
        for name, request in kinds.items():
            answer = request.send(running.url)
            if answer.status_code != 200:
                found["left_out"][name] = answer.text
                continue
            said(name)
            found["kinds"][name] = clients.series(running, request, CLIENTS)
            if name == "JSON":
                rate = found["kinds"][name][-1]["requests_per_second"]
                one = clients.run(running, request, CLIENTS[-1], rate, shared=True)
                found["kinds"]["JSON, all clients of one address"] = [one] if one else []
        found["peak_rss_mib"] = running.peak_rss()
    found["bare"].append(bare(model))
    return found


def compare(model: Path, clients: Clients, everyone: list[Server], turns: int) -> dict[str, Any]:
    shape, expected = shape_of(model), list[int]()
    found: dict[str, Any] = {server.name: [] for server in everyone}
    for _ in range(turns):
        for server in everyone:
            said(server.name)
            with server.running(model) as running:
                request = server.ask(shape)
                image = servers.images_in(request.send(running.url).raise_for_status().content)
                expected = expected or image
                if np.abs(np.subtract(image, expected)).max() > 1:  # rounding may depend on the number of threads
                    sys.exit(f"{server.name}: its image differs from that of {OURS.name}, so they cannot be compared")
                found[server.name].append(clients.series(running, request, CLIENTS))
    return found


def soak(model: Path, clients: Clients, minutes: float) -> dict[str, Any]:
    """Memory each minute, and what it grows by."""
    shape = shape_of(model)
    invalid = Request("/v2/models/ddpm/infer", b'{"inputs": [', servers.JSON)
    mixed = [servers.inference(shape), servers.binary(shape), servers.picture(4), Request("/metrics")]
    times, memory = list[float](), list[float]()
    with OURS.running(model) as running:
        mixed = [each for each in mixed if each.send(running.url).status_code == 200] + [invalid]
        began = time.monotonic()
        process = clients.start(running.url, mixed, SOAK_CLIENTS, 60 * minutes, shared=False)
        while process.poll() is None:
            times.append((time.monotonic() - began) / 60)
            memory.append(running.rss())
            time.sleep(min(SAMPLE_SECONDS, 2 * minutes))
        found: dict[str, Any] = json.loads(process.stdout.read())
        minute, mib = np.array(times), np.array(memory)
        settled = minute >= min(SETTLING, minutes / 3)
        slope = float(np.polyfit(minute[settled], mib[settled], 1)[0])
        whole = np.minimum(minute, math.ceil(minutes) - 1).astype(int)
        by_minute = [float(mib[whole == each].mean()) for each in range(math.ceil(minutes))]
        found |= {"minutes": minutes, "mib_by_minute": by_minute, "mib_per_minute": slope, "clients": SOAK_CLIENTS}
        return found | {"peak_rss_mib": running.peak_rss()}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="sampler.onnx files; the first is used for soak")
    parser.add_argument(
        "--only", default=",".join(PARTS), help="parts, separated by commas (default load,compare,soak)"
    )
    parser.add_argument("--tools", type=Path, default=ROOT / ".ddpm" / "serving", help="(default .ddpm/serving)")
    parser.add_argument("--seconds", type=float, default=5, help="seconds per run (default 5)")
    parser.add_argument("--longest", type=float, default=15, help="maximum seconds per run (default 15)")
    parser.add_argument("--turns", type=int, default=2, help="turns of each server in compare (default 2)")
    parser.add_argument("--minutes", type=float, default=10, help="minutes of soak (default 10)")
    parser.add_argument("--rehearse", action="store_true", help="everything in miniature; writes nothing")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if wrong := [each for each in arguments.models if "=" not in each]:
        parser.error(f"{wrong[0]}: must have the form NAME=FILE, such as digits=models/onnx/sampler.onnx")
    arguments.models = {name: Path(file) for name, file in (each.split("=", 1) for each in arguments.models)}
    arguments.only = arguments.only.split(",")
    if unknown := set(arguments.only) - set(PARTS):
        parser.error(f"--only: unknown part {unknown.pop()}; the parts are {', '.join(PARTS)}")
    if absent := [file for file in arguments.models.values() if not file.is_file()]:
        parser.error(f"{absent[0]}: no such file; `ddpm export` writes models/onnx/sampler.onnx")
    if arguments.rehearse:
        arguments.seconds, arguments.longest, arguments.turns, arguments.minutes = 1.5, 6, 1, 0.5
    return arguments


def main() -> None:
    arguments = parsed()
    models, tools = arguments.models, arguments.tools
    if arguments.bare:
        print(json.dumps(loop(*models.values())))
        return
    needed = [tools / "node_modules" / "autocannon", *([mlserver(tools)] if "compare" in arguments.only else [])]
    if missing := ["node"] * (not shutil.which("node")) + [str(file) for file in needed if not file.exists()]:
        sys.exit(f"{missing[0]}: not found; --help says how to install the tools")
    busy, began = os.getloadavg()[0], time.monotonic()
    if busy > BUSY:
        said(f"The load average is {busy:.1f}: with other work on this machine, the figures say nothing.")
    clients, everyone = Clients(tools, arguments.seconds, arguments.longest), [OURS, *others(tools)]
    results: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "load_before": busy}
    for part in arguments.only:
        if part == "soak":
            results[part] = soak(next(iter(models.values())), clients, arguments.minutes)
        elif part == "load":
            results[part] = {name: load(model, clients) for name, model in models.items()}
        else:
            results[part] = {name: compare(model, clients, everyone, arguments.turns) for name, model in models.items()}
        if not arguments.rehearse:
            before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
            write_atomic(RESULTS, (json.dumps(before | results, indent=1) + "\n").encode())
    print(tables.markdown(results))
    print(json.dumps({"benchmark": "service_compare", "seconds": round(time.monotonic() - began), **results}))


def said(what: object) -> None:
    print(what if isinstance(what, str) else json.dumps(what), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
