"""The number of threads, chosen by measurement."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from deploy.service import threads
from deploy.service.models import Model, Threads
from deploy.service.threads import Loader, candidates, cores, cpus, preferred, quota
from deploy.service.work import Feeds, Span
from diffusion.export import golden, runtime
from tests.deploy.models import write_model


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("model") / "sampler.onnx", "dpm-solver++", True).read_bytes()


@pytest.mark.parametrize(
    ("most", "physical", "expected"),
    [(1, 1, []), (2, 1, [1]), (4, 4, [2, 1]), (12, 6, [8, 6, 4, 2, 1]), (16, 0, [8, 4, 2, 1]), (3, 8, [2, 1])],
)
def test_candidates(most: int, physical: int, expected: list[int]) -> None:
    assert candidates(most, physical) == expected


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({Threads(4): 100.0, Threads(2): 60.0}, Threads(4)),
        ({Threads(4): 100.0, Threads(2): 96.0, Threads(1): 50.0}, Threads(2)),
        ({Threads(8): 100.0, Threads(4): 200.0, Threads(2): 150.0}, Threads(4)),
        ({Threads(2): 100.0, Threads(2, split=True): 112.0}, Threads(2)),
        ({Threads(2): 100.0, Threads(2, split=True): 118.0}, Threads(2, split=True)),
        ({Threads(2): 100.0, Threads(2, split=True): 120.0, Threads(1): 90.0}, Threads(2, split=True)),
    ],
)
def test_fewer_threads_are_preferred_if_they_are_about_as_fast(rates: dict[Threads, float], expected: Threads) -> None:
    assert preferred(rates) == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/pod/service", {"pod/cpu.max": "150000 100000", "pod/service/cpu.max": "max 100000"}, 1.5),
        ("0::/pod/service", {"pod/cpu.max": "300000 100000", "pod/service/cpu.max": "50000 100000"}, 0.5),
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/on/the/host", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/", {}, np.inf),
        (
            "3:cpuset:/a\n1:cpu,cpuacct:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "70000", "cpu/a/cpu.cfs_period_us": "1000"},
            70,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1000"}, np.inf),
        ("1:cpuset:/", {"cpu/cpu.cfs_quota_us": "70", "cpu/cpu.cfs_period_us": "1"}, np.inf),
    ],
)
def test_limits_of_containers(own: str, files: dict[str, str], expected: float, tmp_path: Path) -> None:
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    groups = tmp_path / "groups"
    assert quota(groups, tmp_path / "own") == expected
    assert cpus(groups, tmp_path / "own") == np.ceil(min(expected, len(os.sched_getaffinity(0))))


def test_this_machine(tmp_path: Path) -> None:
    assert quota(tmp_path, tmp_path / "missing") == np.inf
    assert 0 <= cores() <= len(os.sched_getaffinity(0))
    assert 1 <= cpus() <= len(os.sched_getaffinity(0))


def test_the_best_number_is_measured_once_for_each_model(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, tested = list[Threads](), list[int]()
    speeds = {Threads(number): speed for number, speed in ((8, 10.0), (4, 20.0), (2, 30.0), (1, 5.0))}
    speeds[Threads(8, split=True)] = 15.0

    def rate(model: Model, batch: int, steps: int) -> float:
        assert (batch, steps) == (8, 4)
        tried.append(model.threads)
        own = model.session.get_session_options().intra_op_num_threads
        assert own == (1 if model.threads.split else model.threads.number)
        return speeds[tried[-1]]

    def check(session: ort.InferenceSession, _: dict[str, str]) -> golden.Outcome:
        tested.append(session.get_session_options().intra_op_num_threads)
        return golden.Outcome(True, 0)

    monkeypatch.setattr(threads, "rate", rate)
    monkeypatch.setattr(threads, "SECONDS", 1000)
    monkeypatch.setattr(threads, "MAX_SECONDS", 1000)
    monkeypatch.setattr(threads, "cpus", lambda: 8)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(golden, "check", check)
    load = Loader("cpu", 0)
    first = load(content, "1", "ddpm")
    order = [Threads(8), Threads(8, split=True), Threads(4), Threads(2), Threads(1)]
    assert (first.threads, tried, tested) == (Threads(2), order, [8, 2])
    assert first.summary.endswith(
        "2 threads (images x steps/s: 10 with 8 threads, 15 with 8 threads on a split batch, 20 with 4 threads, "
        "30 with 2 threads, 5 with 1 thread)"
    )
    assert load(content, "2", "ddpm").threads == Threads(2)
    assert len(tried) == 5
    speeds[Threads(4)] = 9.0
    assert load(content, "1", "other").threads == Threads(8, split=True)
    assert tried[5:] == order[:3]
    assert Loader("cpu", 3)(content, "1", "ddpm").threads == Threads(3)
    assert len(tried) == 8


def test_the_time_for_measurements_is_limited(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SECONDS", 0.02)
    monkeypatch.setattr(threads, "candidates", lambda most, _: [most] * 3)
    model = Model(content)
    assert threads.measure(model)[Threads(1)] > 0
    monkeypatch.setattr(threads, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(Model, "with_threads", None)
    assert list(threads.measure(model)) == [Threads(1)]


def test_another_number_of_threads_makes_the_same_images(content: bytes) -> None:
    model = Model(content)
    for other_threads in (Threads(2), Threads(2, split=True)):
        other = model.with_threads(other_threads)
        assert (model.threads, other.threads) == (Threads(1), other_threads)
        assert other.session is not model.session
        for images in (1, 3):
            off = model.sample(images)["images"].astype(int) - other.sample(images)["images"]
            assert np.abs(off).max() <= 1


def test_the_parts_of_a_split_batch_are_computed_at_the_same_time(tmp_path: Path) -> None:
    """Each has its share of the images, with the noise and the classes of these; a failure in one is raised."""
    path = write_model(tmp_path / "sampler.onnx", "ddpm", True)
    model = Model(path.read_bytes(), threads=Threads(3, split=True))
    shares, together = list[int](), threading.Barrier(3)
    run = model._run

    def share(given: Feeds, options: Any) -> Any:
        shares.append(given["state"].shape[1])
        together.wait(20)
        return run(given, options)

    model._run = share  # type: ignore[method-assign]
    feeds = golden.inputs(model.inputs, {**model._facts, "ddpm.steps": "2"}, 1, 7)
    found = model.run(feeds, Span(2, 0, 2))
    assert sorted(shares) == [2, 2, 3]
    (expected,) = runtime.session(path.read_bytes(), None, 1).run(["x_0"], feeds)
    np.testing.assert_allclose(found["x_0"], expected, rtol=1e-4, atol=1e-5)
    del feeds["y"]
    with pytest.raises(Exception, match="y"):
        model.run(feeds, Span(2, 0, 2))


def test_a_run_can_be_ended(content: bytes) -> None:
    model, options = Model(content), ort.RunOptions()
    feeds = {"noise": np.zeros((1, *model.shape), np.float32), "y": np.array([0]), "guidance": np.float32([1])}
    assert set(model.run(feeds, Span(1, 0, 1), options)) == {"images", "x_0"}
    options.terminate = True
    with pytest.raises(Exception, match="terminate"):
        model.run(feeds, Span(1, 0, 1), options)
