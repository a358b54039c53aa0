"""benchmarks/service_compare.py: what it asks, and the tables of its results. Its tools are not installed here."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module", name="module")
def load() -> Iterator[Any]:
    """A function that imports a module of the benchmark; only scripts have its folder on their path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield lambda name: import_module(f"serving.{name}")


def run(clients: int, rate: float, **other: Any) -> dict[str, Any]:
    return {
        "clients": clients, "requests_per_second": rate, "p50_ms": 1.25, "p99_ms": 250.4, "statuses": {"200": 9},
        "errors": {}, "clients_cpu": 0.1, "server_cpu": 1.5, "memory_mib": 99.6, **other,
    }  # fmt: skip


def test_every_server_is_asked_for_the_same_image(module: Any) -> None:
    servers = module("servers")
    noise = servers.noise(SHAPE)
    body = json.loads(servers.inference(SHAPE).body)
    assert list(body) == ["inputs"]  # so all outputs are returned, as MLflow does
    for each, expected in zip(body["inputs"], (noise, np.array([10])), strict=True):
        dtype = {"FP32": np.float32, "INT64": np.int64}[each["datatype"]]
        assert np.array_equal(np.array(each["data"], dtype).reshape(each["shape"]), expected)
    sent = json.loads(servers.invocation(SHAPE).body)["inputs"]
    assert sent["steps"] == [10]
    assert np.array_equal(np.array(sent["noise"], np.float32), noise)
    binary = servers.binary(SHAPE)
    size = int(binary.headers["Inference-Header-Content-Length"])
    assert [each["name"] for each in json.loads(binary.body[:size])["inputs"]] == ["noise", "steps"]
    assert binary.body[size:] == noise.tobytes()


def test_images_in_the_answers_of_both_protocols(module: Any) -> None:
    answers = [
        {"outputs": [{"name": "x_0", "data": [0.5, 0.5]}, {"name": "images", "data": [3, 4]}]},
        {"predictions": {"images": [[[[3], [4]]]], "x_0": [[[[0.5, 0.5]]]]}},
    ]
    assert [module("servers").images_in(json.dumps(each).encode()) for each in answers] == [[3, 4], [3, 4]]


def test_the_bare_loop_is_that_of_the_fastest_setting_on_average(module: Any) -> None:
    slow, fast = {"threads": 1, "at_once": 1, "batch": 8}, {"threads": 1, "at_once": 2, "batch": 64}
    rounds = [[slow | {"images_per_second": a}, fast | {"images_per_second": b}] for a, b in ((120, 90), (70, 110))]
    assert module("tables").best(rounds) == fast | {"images_per_second": 100}
    measured = run(64, 80, statuses={"200": 8, "503": 7, "500": 2}, errors={"timeout": 1})
    found = {
        "bare": rounds, "kinds": {"JSON": [measured]}, "left_out": {"binary": "no"}, "peak_rss_mib": 120.4,
    }  # fmt: skip
    lines = module("tables").load(found)
    assert "| JSON | 64 | 80 | 80 % | 1.2 | 250 | 7 | 3 | 19 | 0.10 cores |" in lines
    assert "Peak RSS of the service: 120 MiB." in lines
    assert lines[-1] == "binary: left out, since the answer was: no"


def test_comparison_has_medians_and_all_errors(module: Any) -> None:
    ours = [[run(1, 10), run(8, 30)], [run(1, 20), run(8, 50)], [run(1, 90), run(8, 70)]]
    other = [[run(1, 5, memory_mib=400, statuses={"200": 1, "503": 2})], [run(1, 5, errors={"reset": 3})]]
    silent = [[run(1, 0, p50_ms=None, p99_ms=None)]]
    lines = module("tables").compare({"ours": ours, "other": other, "silent": silent})
    assert lines[0].startswith("| server | 1 client | 8 clients | 503 | errors |")
    assert lines[2] == "| ours | 20 (1.2 / 250) | 50 (1.2 / 250) | 0 | 0 | 17 | up to 0.10 cores | 100 |"
    assert lines[3] == "| other | 5 (1.2 / 250) |  | 2 | 3 | 300 | up to 0.10 cores | 400 |"
    assert lines[4].startswith("| silent | none answered |  | 0 | 0 |  |")


def test_soak_by_minute(module: Any) -> None:
    found = run(16, 9, statuses={"200": 40, "400": 10, "503": 2}, errors={"reset": 1})
    found |= {"mib_by_minute": [100, 101.26], "mib_per_minute": -0.0123, "peak_rss_mib": 130}
    lines = module("tables").soak(found)
    assert lines[:3] == ["| minute | 1 | 2 |", "|---|---|---|", "| RSS, MiB | 100.0 | 101.3 |"]
    assert (
        "1 errors besides the invalid requests, 2 refused. Growth after the start: -0.012 MiB per minute" in lines[-1]
    )


def test_the_readme_has_the_tables_of_the_results(module: Any) -> None:
    results = json.loads((ROOT / "benchmarks/results/service.json").read_text())
    readme = (ROOT / "benchmarks/README.md").read_text().replace("`deploy/service`", "deploy/service").splitlines()
    rows = [line for line in module("tables").markdown(results).splitlines() if line[:1] == "|" and line[:3] != "|--"]
    assert len(rows) == 40
    minutes = [row for row in rows if row.startswith(("| minute", "| RSS"))]
    assert [row for row in rows if row not in (*readme, *minutes)] == []
    assert minutes[1].removeprefix("| RSS, MiB ") in readme


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["file.onnx"], "file.onnx: must have the form NAME=FILE, such as digits=models/onnx/sampler.onnx"),
        (["a=/none.onnx"], "/none.onnx: no such file; `ddpm export` writes models/onnx/sampler.onnx"),
        (["a=b", "--only", "load,soap"], "--only: unknown part soap; the parts are load, compare, soak"),
    ],
)
def test_wrong_arguments(arguments: list[str], line: str) -> None:
    command = [sys.executable, "benchmarks/service_compare.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f": error: {line}\n")
