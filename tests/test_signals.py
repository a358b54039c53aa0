"""Signals that stop training."""

import os
import signal
from types import FrameType

import pytest

from diffusion.errors import Stopped
from diffusion.signals import StopSignals, deferred


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


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_waits_for_the_end_of_the_block(signum: int, error: type[BaseException]) -> None:
    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    done = []

    def block(fault: type[Exception] | None) -> None:
        with deferred():
            os.kill(os.getpid(), signum)
            done.append(fault)
            if fault:
                raise fault

    try:
        for fault in (None, ValueError):
            with pytest.raises(error):
                block(fault)
        assert done == [None, ValueError]
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
