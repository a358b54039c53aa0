"""A tree with recorded runs that tests change, put back as it was: a store holds absolute paths."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from flows.paths import Paths
from tests.flows.tracking.trees import write_tree


def new_tree(root: Path, template: Path) -> Paths:
    """A tree with an empty MLflow database and no results."""
    paths = Paths(root)
    paths.state.mkdir(parents=True)
    shutil.copyfile(template, paths.mlflow_database)
    write_tree(paths)
    return paths


def keep(paths: Paths) -> None:
    """Copy the tree as it is now."""
    shutil.copytree(paths.root, _copy(paths).root)


def restore(paths: Paths) -> None:
    """Make the tree what it was then."""
    copy = _copy(paths)
    with closing(sqlite3.connect(copy.mlflow_database)) as then, closing(sqlite3.connect(paths.mlflow_database)) as now:
        then.backup(now)  # into the same file, which MLflow has open
    for path in (*paths.root.iterdir(), *paths.state.iterdir()):
        if path.is_dir() and path != paths.state:
            shutil.rmtree(path)
        elif path.is_file() and path != paths.mlflow_database:
            path.unlink()
    database = shutil.ignore_patterns(paths.mlflow_database.name)
    shutil.copytree(copy.root, paths.root, ignore=database, dirs_exist_ok=True)


def _copy(paths: Paths) -> Paths:
    return Paths(paths.root.with_name("kept"))
