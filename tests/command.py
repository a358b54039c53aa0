"""Run `ddpm` in this process, for tests that need no signals; faster than starting Python."""

import io
import os
import signal
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import torch

from flows.__main__ import main


def ddpm(tree: Path, *arguments: str, environment: Mapping[str, str], threads: int = 1) -> CompletedProcess[str]:
    """Run `ddpm` in the directory `tree`; returns its exit status and output."""
    out, err = io.StringIO(), io.StringIO()
    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(threads)
    try:
        with chdir(tree), patch.dict(os.environ, environment), redirect_stdout(out), redirect_stderr(err):
            status = main(arguments)
    finally:
        torch.set_num_threads(before)
        signal.signal(signal.SIGTERM, handler)
    return CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
