"""The number of threads, chosen by measurement."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from deploy.service import threads
from deploy.service.models import Model
from deploy.service.threads import Loader, candidates, cores, cpus, quota, smallest_fast
from deploy.service.work import Span
from diffusion.export import golden
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


def test_a_smaller_number_is_used_if_it_is_about_as_fast() -> None:
    assert smallest_fast({4: 100.0, 2: 60.0}) == 4
    assert smallest_fast({4: 100.0, 2: 96.0, 1: 50.0}) == 2
    assert smallest_fast({8: 100.0, 4: 200.0, 2: 150.0}) == 4


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
    tried, tested = list[int](), list[int]()
    speeds = {8: 10.0, 4: 20.0, 2: 30.0, 1: 5.0}

    def rate(model: Model, batch: int) -> float:
        assert 1 <= batch <= threads.BATCH
        tried.append(model.session.get_session_options().intra_op_num_threads)
        return speeds[tried[-1]]

    def check(session: ort.InferenceSession, _: dict[str, str]) -> golden.Outcome:
        tested.append(session.get_session_options().intra_op_num_threads)
        return golden.Outcome(True, 0)

    monkeypatch.setattr(threads, "rate", rate)
    monkeypatch.setattr(threads, "cpus", lambda: 8)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(golden, "check", check)
    load = Loader("cpu", 0)
    first = load(content, "1", "ddpm")
    assert (first.threads, tried, tested) == (2, [8, 4, 2, 1], [8, 2])
    assert first.summary.endswith("2 threads (images/s in one step: 10 with 8, 20 with 4, 30 with 2, 5 with 1)")
    assert load(content, "2", "ddpm").threads == 2
    assert len(tried) == 4
    speeds[4] = 9.0
    assert load(content, "1", "other").threads == 8
    assert tried[4:] == [8, 4]
    assert Loader("cpu", 3)(content, "1", "ddpm").threads == 3
    assert len(tried) == 6


def test_the_time_for_measurements_is_limited(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SECONDS", 0.02)
    monkeypatch.setattr(threads, "candidates", lambda most, _: [most] * 3)
    model = Model(content)
    assert threads.measure(model)[1] > 0
    monkeypatch.setattr(threads, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(Model, "with_threads", None)
    assert list(threads.measure(model)) == [1]


def test_another_number_of_threads_makes_the_same_images(content: bytes) -> None:
    model = Model(content)
    other = model.with_threads(2)
    assert (model.threads, other.threads) == (1, 2)
    assert other.session is not model.session
    off = model.one_step(2)["images"].astype(int) - other.one_step(2)["images"]
    assert np.abs(off).max() <= 1


def test_a_run_can_be_ended(content: bytes) -> None:
    model, options = Model(content), ort.RunOptions()
    feeds = {"noise": np.zeros((1, *model.shape), np.float32), "y": np.array([0]), "guidance": np.float32([1])}
    assert set(model.run(feeds, Span(1, 0, 1), options)) == {"images", "x_0"}
    options.terminate = True
    with pytest.raises(Exception, match="terminate"):
        model.run(feeds, Span(1, 0, 1), options)
