"""Where a stage does its tasks. Not a parameter, since it does not affect the result."""

from typing import Annotated

from pydantic import Field

from diffusion.storage.executors import OWN_PROCESS, Dask, Executor, Processes, usable_cores
from flows.environment import setting

WORKERS = "DDPM_WORKERS"
"""Number of worker processes, by default one for each core; 1 means none."""
SCHEDULER = "DDPM_DASK_SCHEDULER"
"""Address of a Dask scheduler whose workers do the tasks instead."""
SMALL = 1500
"""Number of images up to which starting processes takes longer than it saves, about (benchmarks/README.md)."""


def executor(images: int) -> Executor:
    """The executor for a number of images; raises UserError if a variable has no valid value."""
    workers: int = setting(WORKERS, usable_cores(), Annotated[int, Field(ge=1)])
    scheduler: str = setting(SCHEDULER, "", str)
    if images <= SMALL:
        return OWN_PROCESS
    if scheduler:
        return Dask(scheduler)
    return Processes(workers) if workers > 1 else OWN_PROCESS
