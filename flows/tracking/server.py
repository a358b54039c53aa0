"""`mlflow server` in a single process: `python -m flows.tracking.server` takes its arguments.

MLflow starts uvicorn as a child process, which keeps the port when its parent is killed. Here uvicorn replaces the
parent.
"""

import os
import sys
from typing import Any, NoReturn

from mlflow import server
from mlflow.cli import cli


def become(command: list[str], *, extra_env: dict[str, str], **_: Any) -> NoReturn:
    os.execve(command[0], command, {**os.environ, **extra_env})


if __name__ == "__main__":
    vars(server)["_exec_cmd"] = become
    cli(["server", *sys.argv[1:]])
