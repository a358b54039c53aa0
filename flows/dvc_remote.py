"""Taking the results of a stage from the DVC remote, and giving them to it, as soon as it runs (DDPM_PUSH).

DVC's own `repro --pull` and `push --run-cache` copy the records of all runs each time, and fail where the remote cannot
be reached. Here only the stage's own records are copied, and without a remote the stage is computed.
"""

from collections.abc import Callable
from typing import Any

from dvc.fs import LocalFileSystem, generic
from dvc.stage.cache import _get_stage_hash


def take(stage: Any) -> None:
    """Put the results of an equal run of a stage into the cache, if a remote has them."""
    if all(dep.exists for dep in stage.deps):
        _attempt(f"taken for {stage.addressing}", lambda: _take(stage))


def give(stage: Any) -> None:
    """Push a stage's results, and the record of what they were made from."""
    _attempt(f"pushed of {stage.addressing}", lambda: _give(stage))


def _take(stage: Any) -> None:
    stage.save_deps()
    cache, key = stage.repo.stage_cache, _get_stage_hash(stage)
    remote = _remote(stage)
    records = _folder(remote, key)
    if not cache._load(stage) and remote.fs.exists(records):
        for record in remote.fs.find(records):
            target = f"{cache._get_cache_dir(key)}/{remote.fs.name(record)}"
            generic.copy(remote.fs, record, LocalFileSystem(), target)
    if entry := cache._load(stage):
        for objects in cache._create_stage(entry, wdir=stage.wdir).get_used_objs().values():
            stage.repo.cloud.pull(objects)


def _give(stage: Any) -> None:
    stage.repo.push(stage.addressing)
    cache, key, remote = stage.repo.stage_cache, _get_stage_hash(stage), _remote(stage)
    local = LocalFileSystem()
    for record in local.find(cache._get_cache_dir(key)):
        target = remote.fs.join(_folder(remote, key), local.name(record))
        if not remote.fs.exists(target):
            generic.copy(local, record, remote.fs, target)


def _remote(stage: Any) -> Any:
    """The default remote, where `dvc push --run-cache` writes the records."""
    return stage.repo.cloud.get_remote_odb(None, "push --run-cache", hash_name="md5-dos2unix")


def _folder(remote: Any, key: str) -> str:
    """The folder of the records of all runs of a stage with the same command, dependencies and parameters."""
    return str(remote.fs.join(remote.path, "runs", key[:2], key))


def _attempt(what: str, action: Callable[[], None]) -> None:
    """Do something, or say why it cannot be done."""
    try:
        action()
    except Exception as error:  # each storage backend has its own exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"DVC remote: nothing {what}: {reason}", flush=True)
