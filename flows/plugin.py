"""Prefect plugin: `prefect deployment run train-ddpm`, where Prefect alone asks for `train-ddpm/train-ddpm`.

Prefect loads it on import, before its command line reads its arguments, wherever [tool.prefect.plugins] is enabled.
"""

import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from prefect.plugins import HookContext, register_hook

DEPLOYMENT = "train-ddpm"


def complete(argv: list[str], original: list[str]) -> list[str]:
    """The arguments of `prefect deployment run train-ddpm ...` with the name completed; any others as they are.

    `original` are the interpreter's own arguments, which tell `python -m prefect` from other modules.
    """
    match argv:
        case [program, "deployment" | "deployments" as group, "run", name, *rest] if name == DEPLOYMENT:
            if Path(program).name == "prefect" or (program == "-m" and "prefect" in original[:-3]):
                return [program, group, "run", f"{DEPLOYMENT}/{DEPLOYMENT}", *rest]
    return argv


def answers(url: str) -> bool:
    """Whether anything listens at the address."""
    parts = urlsplit(url)
    try:
        with socket.create_connection(
            (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), timeout=3
        ):
            return True
    except OSError:
        return False


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    completed = complete(sys.argv, sys.orig_argv)
    if completed != sys.argv and ctx.api_url and not answers(ctx.api_url):
        sys.exit(f"No Prefect server answers at {ctx.api_url}: `make up` starts one.")
    sys.argv[:] = completed
