"""How aliases in MLflow are followed."""

import logging
import threading
import weakref
from pathlib import Path

import mlflow
import pytest

from deploy.service.models import ModelError
from deploy.service.served import Models, UnknownModel
from tests.deploy.registry import CHAMPION, Loads, Store, broken, changed, serve

pytestmark = pytest.mark.slow


def test_an_alias_is_followed(store: Store, good: bytes, caplog: pytest.LogCaptureFixture) -> None:
    first = store.add(good)
    served, fixed = serve(CHAMPION), serve("models:/ddpm/1")
    before = served.current
    served.update()
    assert (served.current, before.version) == (before, first)
    with caplog.at_level(logging.INFO):
        second = store.add(changed(good, weights_sha256="b" * 64))
        served.update()
    assert (served.current.version, served.current.weights) == (second, "b" * 64)
    assert (before.version, before.weights) == (first, "a" * 64)
    assert caplog.messages == [
        "ddpm@champion: now serving version 2 (weights bbbbbbbbbbbb) with CPUExecutionProvider (cpu), 1 thread"
    ]
    store.point(first)
    served.update()
    assert (served.current.version, fixed.current.version, served.failures) == (first, first, 0)


def test_a_bad_new_version_is_logged_once(store: Store, good: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store.add(good)
    loads = Loads()
    served = serve(CHAMPION, loads)
    with caplog.at_level(logging.INFO):
        store.add(broken(good))
        for _ in range(3):
            served.update()
    assert (served.current.version, served.failures) == ("1", 3)
    assert loads.versions == ["1", "2"]
    (line,) = caplog.messages
    assert line.startswith("ddpm@champion: still serving version 1: version 2: golden test failed")
    store.add(good)
    served.update()
    assert (served.current.version, served.failures) == ("3", 3)


def test_while_mlflow_is_unreachable(store: Store, good: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store.add(good)
    served = serve(CHAMPION)
    second = store.add(good)
    store.remove(second)
    for _ in range(2):
        served.update()
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        for _ in range(2):
            served.update()
    assert (served.current.version, served.failures) == ("1", 4)
    missing, refused = caplog.messages
    assert "version 2: not available from MLflow" in missing
    assert "not available from MLflow" in refused


def test_a_failed_download_is_retried(
    store: Store, good: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.add(good)
    served = serve(CHAMPION)
    second = store.add(good)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "full"))
        served.update()
    assert (served.current.version, served.failures) == ("1", 1)
    assert "version 2: not available from MLflow ([Errno 2]" in caplog.messages[0]
    served.update()
    assert served.current.version == second


def test_a_rollback_needs_neither_the_file_nor_time(store: Store, good: bytes) -> None:
    loads, first = Loads(), store.add(good)
    served = serve(CHAMPION, loads)
    before = served.current
    second = store.add(changed(good, weights_sha256="b" * 64))
    served.update()
    after = served.current
    store.remove(first)
    store.remove(second)
    for _ in range(2):
        store.point(first)
        served.update()
        assert served.current is before
        store.point(second)
        served.update()
        assert served.current is after
    assert (loads.versions, served.failures) == ([first, second], 0)


def test_at_most_two_versions_are_in_memory(store: Store, good: bytes) -> None:
    loads, first = Loads(), store.add(good)
    served = serve(CHAMPION, loads)
    old = weakref.ref(served.current)
    store.add(changed(good, weights_sha256="b" * 64))
    served.update()
    assert old() is not None
    seen = list[bool]()
    loads.before = lambda: seen.append(old() is not None)
    third = store.add(changed(good, weights_sha256="c" * 64))
    served.update()
    assert (served.current.version, seen, old()) == (third, [False], None)
    store.point(first)  # longer ago: loaded again
    served.update()
    assert (served.current.version, loads.versions) == (first, [first, "2", third, first])


def test_a_rejected_version_is_tried_again(store: Store, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, first = Loads(), store.add(good)
    served = serve(CHAMPION, loads)
    second = store.add(broken(good))
    served.update()
    store.replace(second, changed(good, weights_sha256="b" * 64))
    served.update()  # not yet: its file is large
    assert (served.current.version, loads.versions) == (first, [first, second])
    store.point(first)
    served.update()
    store.point(second)
    served.update()
    assert (served.current.version, loads.versions) == (second, [first, second, second])
    third = store.add(broken(good))
    monkeypatch.setattr("deploy.service.served.RETRY_SECONDS", 0.0)
    served.update()
    store.replace(third, changed(good, weights_sha256="c" * 64))
    served.update()
    assert (served.current.version, served.failures) == (third, 3)


def test_a_number_may_be_used_again(store: Store, good: bytes) -> None:
    store.add(good)
    served = serve(CHAMPION)
    store.begin_anew()
    store.add(changed(good, weights_sha256="b" * 64))
    served.update()
    assert (served.current.version, served.current.weights) == ("1", "b" * 64)


def test_aliases_of_one_model(store: Store, good: bytes, caplog: pytest.LogCaptureFixture) -> None:
    loads, first = Loads(), store.add(good)
    models = Models(loads)
    second = store.add(changed(good, weights_sha256="b" * 64))
    store.point(first)
    store.point(second, "challenger")
    for source in (CHAMPION, "models:/ddpm@challenger", "student=models:/ddpm/1"):
        models.add(source)
    assert models.first is models.find("ddpm") is models.find("ddpm", "champion") is models.find("ddpm", first)
    assert models.find("ddpm", "challenger").version == models.find("ddpm", second).version == second
    assert (models.find("student").name, models.find("student", first).version) == ("student", first)
    assert models.versions("ddpm") == [first, second]
    for name, version, line in (
        ("other", None, "model other: unknown; this service has ddpm, student"),
        ("ddpm", "7", "version 7: not served; ddpm has champion, 1, challenger, 2"),
        ("student", "champion", "version champion: not served; student has 1"),
    ):
        with pytest.raises(UnknownModel) as error:
            models.find(name, version)
        assert str(error.value) == line
    for again in (CHAMPION, "student=models:/ddpm/1"):
        with pytest.raises(ModelError, match="is given twice; remove one"):
            models.add(again)

    store.point(second)  # the challenger is promoted, and is in memory already
    store.add(broken(good))
    store.point(second)
    store.point("3", "challenger")
    with caplog.at_level(logging.INFO):
        follow(models)
    assert models.find("ddpm", "champion") is models.find("ddpm", "challenger")
    assert (models.versions("ddpm"), models.find("student").version) == ([second], first)
    assert [each.failures for each in models.served] == [0, 1, 0]
    assert loads.versions == [first, second, first, "3"]
    assert [line.partition(" (")[0] for line in caplog.messages] == [
        "ddpm@champion: now serving version 2",
        "ddpm@challenger: still serving version 2: version 3: golden test failed: images differs by up to "
        + caplog.messages[1].split(" up to ")[1].partition(" (")[0],
    ]
    assert models.index(True)[1] == {"name": "ddpm", "version": second, "alias": "challenger", "state": "READY"}


def follow(models: Models) -> None:
    """Follow the aliases once."""
    stop = threading.Event()
    last = [each for each in models.served if each.alias][-1]
    update = last.update

    def update_and_stop() -> None:
        update()
        stop.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last, "update", update_and_stop)
        models.follow(0.01, stop)
