"""The bare deployment name, completed for Prefect's command line and for nothing else."""

import logging
import socket
import sys

import pytest
from prefect.plugins import HookContext

from flows import plugin

RUN = ["deployment", "run", "train-ddpm"]


def test_completes_the_bare_name_and_keeps_the_rest() -> None:
    argv = ["/some/bin/prefect", *RUN, "--watch", "-p", "seed=1"]
    expected = ["/some/bin/prefect", "deployment", "run", "train-ddpm/train-ddpm", "--watch", "-p", "seed=1"]
    assert plugin.complete(argv, ["python", *argv]) == expected


def test_completes_it_for_python_m_prefect() -> None:
    argv = ["-m", *RUN]
    assert plugin.complete(argv, ["python", "-m", "prefect", *RUN])[3] == "train-ddpm/train-ddpm"


@pytest.mark.parametrize(
    "argv",
    [
        ["/bin/prefect", "deployment", "run", "train-ddpm/train-ddpm"],
        ["/bin/prefect", "deployment", "run", "other"],
        ["/bin/prefect", "deployment", "run"],
        ["/bin/prefect", "deployment", "inspect", "train-ddpm"],
        ["/bin/prefect", "deployment", "run", "--watch", "train-ddpm"],
        ["/bin/pytest", *RUN],
        ["/bin/prefect"],
        [],
    ],
)
def test_leaves_everything_else_as_it_is(argv: list[str]) -> None:
    assert plugin.complete(argv, ["python", *argv]) == argv


def test_another_module_is_not_prefect() -> None:
    assert plugin.complete(["-m", *RUN], ["python", "-m", "other", *RUN]) == ["-m", *RUN]


def test_says_so_when_no_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/api"
        monkeypatch.setattr(sys, "argv", ["prefect", *RUN])
        context = HookContext(prefect_version="3", api_url=url, logger_factory=logging.getLogger)
        with pytest.raises(SystemExit, match=f"No Prefect server answers at {url}: `make up` starts one"):
            plugin.setup_environment(ctx=context)
