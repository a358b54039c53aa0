"""Try a model repository of `ddpm triton` in a real Triton: python trial.py REPOSITORY ONNX

ONNX is the folder of the files that it was written from, such as models/onnx. Needs nothing of this project, but an
environment of its own: Python 3.11 to 3.13 with its shared library (Debian: libpython3.11), and `pip install
nvidia-pytriton==0.7.0 onnxruntime`. That package contains Triton without its ONNX Runtime backend, so model.py runs the
graphs in Triton's Python backend; everything else in the repository's configuration stays. The clients are NVIDIA's.
Expected are the outputs of the files in ONNX.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import pytriton
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

TRITON = Path(pytriton.__file__).parent / "tritonserver"
REQUESTS, AT_ONCE, SECONDS = 48, 16, 60
Arrays = dict[str, NDArray[Any]]


class Clients(threading.local):
    """A client for each thread, over HTTP or gRPC."""

    def __init__(self, module: Any, port: int) -> None:
        self.module = module
        self.client = module.InferenceServerClient(f"127.0.0.1:{port}")

    def infer(self, name: str, given: Arrays) -> Any:
        inputs = []
        for key, array in given.items():
            inputs.append(self.module.InferInput(key, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        return self.client.infer(name, inputs)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python trial.py REPOSITORY ONNX")
    repository, graphs = map(Path, sys.argv[1:])
    with running(repository) as (http, grpc):
        print(f"Triton {http.client.get_server_metadata()['version']}")
        for name in ("denoiser", "sampler"):
            session = ort.InferenceSession(graphs / f"{name}.onnx", providers=["CPUExecutionProvider"])
            described(name, session, http)
            for clients in (http, grpc):
                joined(name, session, http, clients)
                refused(name, session, http, clients)


@contextmanager
def running(repository: Path) -> Iterator[tuple[Clients, Clients]]:
    """Triton with a copy of the repository whose backend is model.py; clients over HTTP and gRPC."""
    with TemporaryDirectory() as directory:
        copy, backends, log = (Path(directory) / name for name in ("repository", "backends", "log"))
        shutil.copytree(repository, copy)
        for path in copy.glob("*/config.pbtxt"):
            path.write_text(path.read_text().replace('platform: "onnxruntime_onnx"', 'backend: "python"'))
            shutil.copy(Path(__file__).with_name("model.py"), path.parent / "1")
        shutil.copytree(TRITON / "backends", backends)
        python = "{}.{}".format(*sys.version_info)
        shutil.copy(TRITON / "python_backend_stubs" / python / "triton_python_backend_stub", backends / "python")
        ports = {"http": free_port(), "grpc": free_port()}
        command = [f"{TRITON}/bin/tritonserver", f"--model-repository={copy}", f"--backend-directory={backends}"]
        command += [f"--{kind}-address=127.0.0.1" for kind in ports] + ["--allow-metrics=false"]
        command += [f"--{kind}-port={port}" for kind, port in ports.items()]
        libraries = TRITON.parents[1] / "nvidia_pytriton.libs"
        paths = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(libraries)}
        with log.open("wb") as file:
            server = subprocess.Popen(command, env=os.environ | paths, stdout=file, stderr=file)
        try:
            clients = Clients(tritonclient.http, ports["http"]), Clients(tritonclient.grpc, ports["grpc"])
            wait_for(clients[0], server, log)
            yield clients
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def wait_for(http: Clients, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            if http.client.is_server_ready():
                return
        except OSError:  # not listening yet
            pass
        time.sleep(0.1)
    sys.exit(f"{log.read_text()}\nTriton is not ready")


def described(name: str, session: ort.InferenceSession, http: Clients) -> None:
    """Triton's description has the inputs and outputs of the file, except for the number of steps."""
    metadata, config = http.client.get_model_metadata(name), http.client.get_model_config(name)
    assert {value["name"] for value in metadata["inputs"]} == names(session)
    assert [value["name"] for value in metadata["outputs"]] == [value.name for value in session.get_outputs()]
    shown = [f"{value['name']} {value['datatype']} {value['shape']}" for value in metadata["inputs"]]
    shown += [f"{key} = {value['string_value']}" for key, value in sorted(config["parameters"].items())]
    print(f"{name}: {'; '.join(shown)}")


def names(session: ort.InferenceSession) -> set[str]:
    return {value.name for value in session.get_inputs()} - {"steps"}


def request(session: ort.InferenceSession, images: int, steps: int, seed: int) -> Arrays:
    """Inputs for Triton; guidance and class differ between the images."""
    facts, generator = session.get_modelmeta().custom_metadata_map, np.random.default_rng(seed)
    shape = [int(facts[f"ddpm.{side}"]) for side in ("channels", "height", "width")]
    given: Arrays = {
        "noise": generator.standard_normal((images, *shape), np.float32),
        "x_t": generator.standard_normal((images, *shape), np.float32),
        "steps_noise": generator.standard_normal((images, steps, *shape), np.float32),
        "t": generator.integers(int(facts["ddpm.num_timesteps"]), size=(images, 1)),
        "y": generator.integers(-1, max(1, len(json.loads(facts["ddpm.classes"]))), size=(images, 1)),
        "guidance": generator.choice(np.array([0, 1, 2.5, 7], np.float32), size=(images, 1)),
    }
    return {name: array for name, array in given.items() if name in names(session)}


def alone(session: ort.InferenceSession, given: Arrays) -> Arrays:
    """The outputs of the file itself, one image at a time."""
    rows, outputs = [], [value.name for value in session.get_outputs()]
    for image in range(len(next(iter(given.values())))):
        feeds = {name: array[image : image + 1] for name, array in given.items()}
        feeds |= {name: feeds[name][:, 0] for name in {"t", "y", "guidance"} & set(feeds)}
        feeds |= {name: feeds[name].swapaxes(0, 1) for name in {"steps_noise"} & set(feeds)}
        feeds |= {value.name: np.array([0]) for value in session.get_inputs() if value.name == "steps"}
        rows.append(session.run(outputs, feeds))
    return {name: np.concatenate(parts) for name, parts in zip(outputs, zip(*rows, strict=True), strict=True)}


def joined(name: str, session: ort.InferenceSession, http: Clients, clients: Clients) -> None:
    """Requests that are sent at once run as fewer, larger batches, and each is answered as if it were alone."""
    asked = [request(session, 1 + number % 4, 3 + number // 12 % 2, number) for number in range(REQUESTS)]
    before = batches(http, name)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda given: clients.infer(name, given), asked))
    ran = {size: count - before.get(size, 0) for size, count in batches(http, name).items()}
    largest = 0.0
    for given, answer in zip(asked, answers, strict=True):
        for output, expected in alone(session, given).items():
            found = answer.as_numpy(output)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            off = np.abs(found.astype(float) - expected.astype(float)).max()
            assert off <= (1 if output == "images" else 1e-3), (name, output, off)
            largest = max(largest, off)
    kind = clients.module.__name__
    shown = ", ".join(f"{count} of {size}" for size, count in sorted(ran.items()) if count)
    print(f"{name}: {kind}, {REQUESTS} requests; largest difference {largest:.2g}; images in batches: {shown}")
    assert sum(ran.values()) < REQUESTS


def batches(http: Clients, name: str) -> dict[int, int]:
    """How many batches of each size Triton has run."""
    (model,) = http.client.get_inference_statistics(name)["model_stats"]
    return {batch["batch_size"]: batch["compute_infer"]["count"] for batch in model.get("batch_stats", [])}


def refused(name: str, session: ort.InferenceSession, http: Clients, clients: Clients) -> None:
    """Wrong inputs get an error that names what is wrong, and the request after them an answer."""
    right, most = request(session, 2, 3, 0), http.client.get_model_config(name)["max_batch_size"]
    wrong = [("batch-size", request(session, most + 1, 3, 0)), ("steps", right | {"steps": np.array([[4], [4]])})]
    for key, array in right.items():
        wrong += [(key, {other: right[other] for other in right if other != key})]
        changed = array[..., :0], array.astype(np.int8), np.full_like(array, 9999)
        wrong += [(key, right | {key: other}) for other in changed]
    for what, given in wrong:
        try:
            clients.infer(name, given)
            said = "accepted"
        except InferenceServerException as error:
            said = error.message()
        assert what in said, (name, what, said)
    clients.infer(name, right)
    print(f"{name}: {clients.module.__name__}, {len(wrong)} wrong requests refused")


if __name__ == "__main__":
    main()
