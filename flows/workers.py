"""Where a stage does its tasks. Not a parameter, since it does not affect the result."""

from typing import Annotated

from pydantic import Field

from diffusion.storage.dask import Dask
from diffusion.storage.executors import OWN_PROCESS, Executor, usable_cores
from diffusion.storage.processes import Processes
from flows.environment import setting

WORKERS = "DDPM_WORKERS"
"""Number of worker processes, by default one for each core; 1 means none."""
SCHEDULER = "DDPM_DASK_SCHEDULER"
"""Address of a Dask scheduler whose workers do the tasks instead."""
SMALL = 1500
"""Number of images up to which starting processes takes longer than it saves, about (benchmarks/README.md)."""


def executor(images: int) -> Executor:
    """The executor for a number of images; raises UserError if a variable has no valid value."""
    workers: int | None = setting(WORKERS, None, Annotated[int, Field(ge=1)])
    if scheduler := setting(SCHEDULER, "", str):
        return Dask(scheduler)
    if workers is None:
        workers = 1 if images <= SMALL else usable_cores()
    return Processes(workers) if workers > 1 else OWN_PROCESS
