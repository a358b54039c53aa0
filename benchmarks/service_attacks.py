"""Hostile and careless clients of deploy/service: what they get, and what others notice.

Run it in a working tree with an exported model:

    python benchmarks/service_attacks.py

Each attack has a service of its own, and another process that asks for its health every 20 ms. The table has what the
attackers got; the slowest answer of the health check; how long a request for one picture took meanwhile or right
after; and the most memory the service had.
"""

import argparse
import json
import math
import multiprocessing
import signal
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

import psutil
from attacked import LIGHT, TIMEOUT_SECONDS, Target, probe, service


class Row(NamedTuple):
    """A line of the table."""

    attack: str
    got: str
    health_ms: float
    light_s: float
    peak_mib: float
    tracebacks: int


def many_lists(target: Target) -> str:
    """A body of 60 MB that is a list of twenty million empty lists."""
    head = b'{"inputs": [{"name": "noise", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": ['
    return target.ask("/v2/models/ddpm/infer", head + b"[]," * 20_000_000 + b"[]]}]}")


def half_sent(target: Target) -> str:
    """1,100 connections whose request never ends."""
    got = Counter[str]()
    with ExitStack() as stack:
        for _ in range(1100):
            try:
                connection = stack.enter_context(target.connect())
                connection.sendall(b"GET /images HTTP/1.1\r\nHost: x\r\n")
            except OSError as error:
                got[type(error).__name__] += 1
        got["a picture for others: " + target.ask(LIGHT, timeout=30)] += 1
    return _counted(got)


def slow_body(target: Target) -> str:
    """A body of which a byte arrives each second."""
    with target.connect() as connection:
        connection.sendall(b"POST /v2/models/ddpm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 60\r\n\r\n")
        for second in range(30):
            connection.settimeout(1)
            with suppress(TimeoutError):
                received = connection.recv(4096)
                return f"{received.split()[1].decode() if received else 'closed'} after {second} s"
            connection.sendall(b" ")
    return "nothing in 30 s"


def many_bodies(target: Target) -> str:
    """300 bodies of 1 MB, or as large as allowed, all but the last byte; meanwhile one of others is asked for."""
    size = 2**20
    while size > 2**10 and target.ask("/v2/models/ddpm/infer", b" " * size).startswith("413"):
        size //= 2
    got = Counter[str]()
    with ExitStack() as stack:
        for _ in range(300):
            try:
                connection = stack.enter_context(target.connect())
                connection.sendall(
                    f"POST /v2/models/ddpm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
                )
                connection.sendall(b" " * (size - 1))
            except OSError as error:
                got[type(error).__name__] += 1
        got[f"of {size} bytes; a picture for others: {target.ask(LIGHT, timeout=30)}"] += 1
    return _counted(got)


def unread(target: Target) -> str:
    """30 requests for the largest responses, which nobody reads."""
    size = "n=49&steps=1&scale=10"
    with ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(target.connect()).sendall(f"GET /images?{size} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return f"a picture for others: {target.ask(LIGHT)}"


def streams(target: Target) -> str:
    """Sixteen clients that ask for one picture after another; `light_s` is that of a request for 8 among them."""
    ended, count = threading.Event(), Counter[str]()

    def stream() -> None:
        while not ended.is_set():
            count[target.ask(f"/images?n=1&steps={target.steps}")] += 1

    threads = [threading.Thread(target=stream) for _ in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    before, began = count.total(), time.perf_counter()
    status = target.ask(f"/images?n=8&steps={target.steps}")
    seconds, meanwhile = time.perf_counter() - began, count.total() - before
    ended.set()
    for thread in threads:
        thread.join()
    return f"8 pictures: {status} after {seconds:.1f} s, with {meanwhile} for others meanwhile"


def long_work(target: Target) -> str:
    """Eight requests for 64 pictures of the most steps, and a short one behind them."""
    with ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(target.connect())
            connection.sendall(f"GET /images?n=64&steps={target.steps} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(1)
        began = time.perf_counter()
        status = target.ask(LIGHT)
        return f"8 asked; a picture for others: {status} after {time.perf_counter() - began:.1f} s"


def gone(target: Target) -> str:
    """As many, whose clients leave at once."""
    long_work(target)
    time.sleep(0.5)
    page = target.read("/metrics").decode()
    (waiting,) = [line.split()[1] for line in page.splitlines() if line.startswith("ddpm_waiting_images ")]
    return f"images still waiting: {float(waiting):.0f}"


def protocol(target: Target) -> str:
    """What is not HTTP, contradicts itself or asks for another protocol."""
    post = b"POST /v2/models/ddpm/infer HTTP/1.1\r\nHost: x\r\n"
    requests = {
        "noise": b"\x16\x03\x01\x00\xa5\r\n\r\n",
        "two lengths": post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "length and chunks": post + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        "half a body": post + b"Content-Length: 100\r\n\r\n{}",
        "websocket": post + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\n{}",
        "long header": post + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
    }
    return "; ".join(f"{name}: {target.send(request)}" for name, request in requests.items())


def bombs(target: Target) -> str:
    """16 clients that each send, again and again for 5 s, the largest body allowed that expands a thousandfold."""
    size = 2**20
    while target.post(b" " * size).startswith("413"):
        size = size * 7 // 8
    bomb, encoder = bytearray(), zlib.compressobj(9, zlib.DEFLATED, 31)
    while len(bomb) < size:
        bomb += encoder.compress(bytes(2**22))
    del bomb[size:]
    until, got = time.monotonic() + 5, Counter[str]()

    def send() -> None:
        while time.monotonic() < until:
            got[target.post(bytes(bomb), {"Content-Encoding": "gzip"})] += 1

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    began = time.perf_counter()
    light = target.ask(LIGHT)
    seconds = time.perf_counter() - began
    for thread in threads:
        thread.join()
    return f"{size} bytes each: {_counted(got)}; a picture for others: {light} after {seconds:.1f} s"


def binary(target: Target) -> str:
    """Binary tensors whose sizes, or the length of the JSON before them, are not true."""
    shape = json.loads(target.read("/v2/models/ddpm"))["inputs"][0]["shape"][1:]
    size = 4 * math.prod(shape)

    def send(claimed: object, sent: int, images: int = 1, length: object = None, **more: object) -> str:
        tensor = {"name": "noise", "datatype": "FP32", "shape": [images, *shape]}
        text = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": claimed}, **more}]}).encode()
        return target.post(text + bytes(sent), {"Inference-Header-Content-Length": str(length or len(text))})

    requests = {
        "true": send(size, size),
        "short": send(size, size - 1),
        "long": send(size, size + 1),
        "negative": send(-size, size),
        "huge": send(2**62, size, 2**60),
        "huge number": send(10**1000, size),
        "length beyond the body": send(size, size, length=10**9),
        "huge length": send(size, size, length="9" * 5000),
        "negative length": send(size, size, length=-1),
        "data twice": send(size, size, data=[0]),
    }
    return "; ".join(f"{name}: {got}" for name, got in requests.items())


def stopped(target: Target) -> str:
    """SIGTERM while 64 pictures of the most steps are asked for."""
    with target.connect() as connection:
        connection.sendall(f"GET /images?n=64&steps={target.steps} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(1)
        target.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        connection.settimeout(TIMEOUT_SECONDS)
        try:
            received = connection.recv(4096).split()[1:2]
        except OSError as error:
            received = [type(error).__name__.encode()]
        with suppress(subprocess.TimeoutExpired):
            target.process.wait(TIMEOUT_SECONDS)
    status = target.process.poll()
    if status is None:
        return f"still running after {TIMEOUT_SECONDS:g} s"
    return f"response {b' '.join(received).decode() or 'none'}; status {status} after {time.monotonic() - began:.0f} s"


ATTACKS: dict[str, Callable[[Target], str]] = {
    each.__name__: each
    for each in (
        many_lists,
        half_sent,
        slow_body,
        many_bodies,
        unread,
        streams,
        long_work,
        gone,
        protocol,
        bombs,
        binary,
        stopped,
    )
}


def _counted(found: Counter[str]) -> str:
    return "; ".join(name if count == 1 else f"{count} x {name}" for name, count in found.items())


def attack(name: str, model: str, options: Sequence[str]) -> Row:
    """Run one attack on a service of its own."""
    with service(model, options) as target:
        ours, theirs = multiprocessing.Pipe()
        probing = multiprocessing.Process(target=probe, args=(target.host, target.port, theirs), daemon=True)
        probing.start()
        peak, done, light = [0.0], threading.Event(), [0.0]

        def watch() -> None:
            while not done.wait(0.02):
                with suppress(psutil.Error):
                    peak[0] = max(peak[0], psutil.Process(target.process.pid).memory_info().rss / 2**20)

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            got = ATTACKS[name](target)
            if name != "stopped":
                began = time.perf_counter()
                target.ask(LIGHT)
                light[0] = time.perf_counter() - began
        finally:
            done.set()
            watching.join()
        ours.send("")
        slowest = ours.recv() if name != "stopped" else 0.0
        probing.join()
        return Row(name, got, 1000 * slowest, light[0], peak[0], target.log.read_text().count("Traceback"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/onnx/sampler.onnx", help="the model (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="attacks (default: all)")
    arguments, options = parser.parse_known_args()
    print("| attack | result | slowest health check | one picture | memory | tracebacks |\n|---|---|---|---|---|---|")
    for name in arguments.only:
        row = attack(name, arguments.model, options)
        print(
            f"| {name} | {row.got} | {row.health_ms:.0f} ms | {row.light_s:.1f} s | {row.peak_mib:.0f} MiB | "
            f"{row.tracebacks} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
