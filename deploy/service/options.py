"""The options of the command line."""

import argparse
import re
import sys
import threading
from typing import NoReturn
from urllib.parse import urlsplit

MAX_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, even if a value has several."""

    def error(self, message: str) -> NoReturn:
        super().error(" ".join(message.split()))


def positive_int(text: str) -> int:
    """Parse a positive integer."""
    return _integer(text, 1, f"must be a positive integer (got {text})")


def natural(text: str) -> int:
    """Parse a non-negative integer."""
    return _integer(text, 0, f"must be 0 or a positive integer (got {text})")


def thread_count(text: str) -> int:
    """Parse a number of threads."""
    return _integer(text, 0, f"must be from 0 to {MAX_THREADS} (got {text})", MAX_THREADS)


def _integer(text: str, low: int, problem: str, high: int = sys.maxsize) -> int:
    if not text.isdecimal() or len(text) > 20 or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(problem)
    return int(text)


def non_negative(text: str) -> float:
    """Parse a non-negative number."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"must be a non-negative number (got {text})")
    return value


def origin(text: str) -> str:
    """Parse an origin, or "*"."""
    try:
        valid = text == "*" or (re.fullmatch(r"https?://[^/?#@\s]+", text) and urlsplit(text).port != 0)
    except ValueError:  # not a port, or not an IPv6 address
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"must be https://HOST[:PORT], without a path, or * (got {text})")
    return text.lower()


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="python -m deploy.service",
        description="Serve sampler.onnx models over HTTP: Open Inference Protocol v2, PNG images, and a browser page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def option(name: str, **keywords: object) -> None:
        made.add_argument(f"--{name}", **keywords)  # type: ignore[arg-type]

    option(
        "model",
        required=True,
        action="append",
        metavar="[NAME=]SOURCE",
        default=argparse.SUPPRESS,
        help="a sampler.onnx file, or models:/NAME@ALIAS or models:/NAME/VERSION in MLflow (MLFLOW_TRACKING_URI), and "
        "its name in URLs, by default that in MLflow, or ddpm for a file; repeat it for more models or versions of one",
    )
    option("host", default="127.0.0.1", help="address to listen on")
    option("port", type=int, default=8000, help="port to listen on; 0 for a free one")
    made.set_defaults(keys=None, cors=[], access_log=None)
    option(
        "keys",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="file of the keys that clients need (python -m deploy.service.keys --help), or none if everyone may use "
        "the service, or a proxy asks who they are (default: none on a loopback address; required for others)",
    )
    option(
        "cors",
        type=origin,
        action="append",
        metavar="ORIGIN",
        default=argparse.SUPPRESS,
        help="https://HOST[:PORT] whose pages may use the service, or * for all; repeatable (default: none)",
    )
    option("log-format", choices=["text", "json"], default="text", help="json: an object per line")
    option(
        "access-log",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="log each request (default: with --log-format json)",
    )
    option("device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if ONNX Runtime can use one")
    option("threads", type=thread_count, default=0, help="ONNX Runtime threads per model; 0 to measure what is best")
    option("max-images", type=positive_int, default=64, help="maximum images per request")
    option("max-body", type=positive_int, default=16 * 2**20, help="maximum bytes per request body")
    option("cache", type=natural, default=2**26, metavar="BYTES", help="memory for pictures requested by seed; 0: none")
    option("max-batch", type=positive_int, default=64, help="maximum images per batch of joined requests")
    option("max-delay", type=non_negative, default=0, help="milliseconds to wait for more requests while idle")
    option("max-waiting", type=positive_int, default=512, help="maximum queued images; half for a client that is alone")
    option("max-wait", type=non_negative, default=60, help="maximum seconds a request may wait for others (estimated)")
    option("max-seconds", type=non_negative, default=300, help="maximum seconds to compute a response")
    option("poll", type=non_negative, default=10, help="seconds between checks of the MLflow alias for a new version")
    option("drain", type=non_negative, default=1, help="seconds to keep accepting connections after SIGTERM")
    return made
