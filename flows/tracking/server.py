"""`mlflow server` in a single process: `python -m flows.tracking.server` takes its arguments.

MLflow starts uvicorn as a child, which goes on holding the port when its parent is killed. Here uvicorn takes the
parent's place.
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
