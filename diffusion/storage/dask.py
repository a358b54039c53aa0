"""Dask: tasks on the workers of a cluster."""

import hashlib
import logging
import platform
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Generic

from PIL import features

from diffusion.errors import UserError
from diffusion.storage.executors import MAX_BYTES, Result, Task, ordered_map

SECONDS_TO_ANSWER = 10
"""How long a Dask scheduler may take to answer, and to name its first worker."""
SETTINGS = {
    "distributed.admin.large-graph-warning-threshold": MAX_BYTES,
    "distributed.admin.low-level-log-length": 10,  # messages, which include those tasks that are smaller than 1 MB
}
"""Settings of Dask, in which tasks usually carry no data."""
DECODERS = ("jpg", "libjpeg_turbo", "zlib", "zlib_ng", "libtiff", "jpg_2000", "webp", "avif", "littlecms2")
"""Libraries of Pillow, by its names, on which pixels and stored bytes depend."""


@dataclass(frozen=True)
class Dask:
    """Does tasks on the workers of a Dask cluster; needs the extra `cluster`.

    Workers need the same software, but no files.
    """

    address: str
    """That of the scheduler, such as tcp://10.0.0.1:8786."""
    shares_files: ClassVar[bool] = False

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], size: Callable[[Task], int]
    ) -> Generator[tuple[Task, Result]]:
        """As `Executor.map`.

        Raises UserError if the extra is not installed, or if the scheduler or the workers cannot be used.
        """
        try:
            import dask
            from distributed import Client, KilledWorker
            from distributed.comm.core import CommClosedError
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.address}: Dask is not installed ({error}); install the extra: `pip install -e '.[cluster]'`"
            ) from None
        for name in logging.root.manager.loggerDict:
            if name.startswith(("distributed", "tornado")):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # hide tracebacks when a connection is lost
        dask.config.set(SETTINGS)
        try:
            client = Client(self.address, timeout=SECONDS_TO_ANSWER)
        except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last two for a key that is missing
            raise UserError(f"{self.address}: no Dask scheduler answers ({error})") from None
        with client:
            executor, remote = client.get_executor(pure=False), Remote(function, software())

            def submit(task: Task) -> Future[Result]:
                return executor.submit(partial(remote, task))  # Dask would look for its own objects in an argument

            def result(future: Future[Result]) -> Result:
                # Without a scheduler or workers, a future never ends.
                while not wait([future], SECONDS_TO_ANSWER).done:
                    if client.status != "running":
                        raise CancelledError
                    client.wait_for_workers(1, SECONDS_TO_ANSWER)
                return future.result()

            try:
                client.wait_for_workers(1, SECONDS_TO_ANSWER)
                most = 2 * sum(client.nthreads().values())
                yield from ordered_map(submit, result, tasks, size, most, KilledWorker)
            except TimeoutError:
                raise UserError(
                    f"{self.address}: the Dask scheduler has no workers; start some where this project is installed"
                ) from None
            except (CancelledError, CommClosedError):
                raise UserError(f"{self.address}: the connection to the Dask scheduler was lost") from None


@dataclass(frozen=True)
class Remote(Generic[Task, Result]):
    """A function to call on another machine."""

    function: Callable[[Task], Result]
    software: Mapping[str, str]

    def __call__(self, task: Task) -> Result:
        """Raises UserError if that machine has other software."""
        machine, own = platform.node(), software()
        for name, wanted in self.software.items():
            if own.get(name) != wanted:
                raise UserError(
                    f"the Dask worker on {machine} has {name} {own.get(name)}, but {wanted} is used here; install the "
                    "same there, and start the worker again"
                )
        with _ALONE:
            return self.function(task)


_ALONE = threading.Lock()
"""Held while a task is done: the decoders' warnings belong to the whole process."""


@cache
def software() -> dict[str, str]:
    """What the bytes of a result depend on, with versions."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    packages = {name: version(name) for name in ("numpy", "pillow", "scipy", "imagehash")}
    decoders = {name: str(features.version(name)) for name in DECODERS if features.check(name)}
    return packages | decoders | {"the package diffusion with digest": code.hexdigest()[:12]}
