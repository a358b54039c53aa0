"""The database of the trials of sweeps."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from diffusion.errors import UserError
from flows import sweep_ddpm
from flows.sweep import study

pytestmark = pytest.mark.slow

SWEEP = ["-p", 'over={"train.learning_rate": [0.001]}', "-p", "name=lr"]


@pytest.fixture
def database(repository: Path) -> Path:
    (repository / ".ddpm/sweeps").mkdir(parents=True)
    return repository / ".ddpm/sweeps/sweeps.db"


def test_a_damaged_one_is_named_with_what_to_do(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database.write_text("not a database")
    assert sweep_ddpm.main(SWEEP) == 1
    error = capsys.readouterr().err
    assert error.startswith("sweep-ddpm: error: DDPM_SWEEPS: sqlite:///")
    assert error.endswith(
        ".ddpm/sweeps/sweeps.db cannot be used ((sqlite3.DatabaseError) file is not a database); if sweeps.db is "
        "damaged, delete it, and the sweeps begin anew\n"
    )


def test_a_study_that_no_sweep_has_made_is_left_alone(database: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    optuna.create_study(storage=storage, study_name="lr").enqueue_trial({})
    assert sweep_ddpm.main(SWEEP) == 1
    assert capsys.readouterr().err.startswith("sweep-ddpm: error: name: another sweep is called 'lr' (its over, ")
    assert len(optuna.load_study(storage=storage, study_name="lr").trials) == 1
    storage.remove_session()
    storage.engine.dispose()


def test_with_postgresql_a_sweep_runs_on_one_machine() -> None:
    """Its advisory locks, imitated; deploy/team/rehearse.py has the real ones."""
    held = list[int]()

    def lock(_: object, given: dict[str, int]) -> bool:
        assert -(2**63) <= given["key"] < 2**63  # a bigint
        held.append(given["key"])
        return held.count(given["key"]) == 1

    connection = SimpleNamespace(scalar=lock, execute=lambda _: None)
    connection.execution_options = lambda **_: connection
    engine = SimpleNamespace(dialect=SimpleNamespace(name="postgresql"), connect=lambda: nullcontext(connection))

    def alone(name: str) -> AbstractContextManager[Any]:
        return study._alone(name, SimpleNamespace(engine=engine))  # type: ignore[arg-type]

    with alone("lr"), alone("rates"):
        pass
    with pytest.raises(UserError, match=r"^sweep 'lr' is running on another machine; wait for it"), alone("lr"):
        pass
