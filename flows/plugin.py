"""Prefect plugin: adapts Prefect's command line to this repository.

`prefect deployment run train-ddpm`, `distill-ddpm` and `sweep-ddpm` work without the flow's name, `--watch` shows one
line per stage, and an unreachable local server is reported in one line. Prefect loads the plugin on import, before its
command line reads its arguments, wherever [tool.prefect.plugins] is enabled.
"""

import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from prefect.plugins import HookContext, register_hook

from flows import addresses, deployment

SERVER_COMMANDS = {
    *("api", "artifact", "automation", "block", "concurrency-limit", "deploy", "deployment", "event", "flow"),
    *("flow-run", "gcl", "global-concurrency-limit", "task-run", "variable", "work-pool", "work-queue", "worker"),
}
"""Command groups that need the server; some also have a plural form."""


def arguments(argv: list[str], original: list[str]) -> list[str] | None:
    """The arguments of Prefect's command line; None if another program runs.

    `original` are the interpreter's own arguments, which distinguish `python -m prefect` from other modules.
    """
    match argv:
        case [program, *rest] if Path(program).name == "prefect":
            return rest
        case ["-m", *rest] if "prefect" in original[: len(original) - len(rest)]:
            return rest
    return None


def complete(given: list[str]) -> list[str]:
    """The arguments of `prefect deployment run train-ddpm ...` with the name completed, likewise of the other flows.

    Any others are left as they are.
    """
    match given:
        case ["deployment" | "deployments" as group, "run", name, *rest] if name in deployment.FLOWS:
            return [group, "run", f"{name}/{name}", *rest]
    return given


def needs_server(given: list[str]) -> bool:
    """Whether a command needs the server; a group alone prints its help."""
    if "--help" in given or (len(given) < 2 and given != ["deploy"]):
        return False
    return given[0].removesuffix("s") in SERVER_COMMANDS


def watches(given: list[str]) -> bool:
    """Whether a command follows a flow run."""
    match given:
        case ["deployment" | "deployments", "run", *rest]:
            return "--watch" in rest
        case ["flow-run" | "flow-runs", "watch", *_]:
            return "--help" not in given
    return False


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    given = arguments(sys.argv, sys.orig_argv)
    if given is None:
        return
    url = ctx.api_url or ""
    local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")  # others may be reached through a proxy only
    if needs_server(given) and local and not addresses.listens(url):
        sys.exit(addresses.no_server_message(url))
    sys.argv[1:] = complete(given)
    if watches(given):
        with suppress(Exception):  # another Prefect than the one known here keeps its own display
            from flows import watch

            watch.install()
