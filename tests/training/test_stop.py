"""Signals that stop training."""

import os
import signal

import pytest

from diffusion.errors import Stopped
from diffusion.training.stop import StopSignals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_until_it_is_asked_for(signum: int) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        stop.check()
        assert stop.received() == 0
        os.kill(os.getpid(), signum)
        assert stop.received() == signum
        with pytest.raises(Stopped, match=f"^stopped by {signal.Signals(signum).name}$"):
            stop.check()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
