"""Distributed training: the same model as with one process, and a clean end when a process is lost."""

import os
import re
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from diffusion.errors import AlreadyReported, UserError
from diffusion.storage.files import parse_csv
from diffusion.training.distributed import process_group
from flows.params import Params
from flows.stages.training import check_devices
from tests.machine import free_port
from tests.rounding import TIMES
from tests.training import trees

pytestmark = pytest.mark.slow


def weights(tree: Path) -> dict[str, torch.Tensor]:
    return load_file(tree / "models/ddpm/model.safetensors")


def distances(one: Path, other: Path) -> dict[str, float]:
    """Norm of what two trainings' weights differ by, and the largest relative difference in each of their curves."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    found = {"weights": torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).norm().item()}
    for file in ("loss.csv", "heldout.csv"):
        rows = [parse_csv((tree / "reports/train_curves" / file).read_bytes()) for tree in (one, other)]
        assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
        values = np.array([[list(row.values()) for row in each] for each in rows])
        found[file] = (np.abs(values[0] - values[1]) / np.abs(values[1]).clip(1e-300)).max()
    return found


class Alone(NamedTuple):
    """Training with one process."""

    tree: Path
    rounding: dict[str, float]
    """`distances` to the same training with the sums of each batch in another order."""

    def assert_same_as(self, tree: Path) -> None:
        """Up to rounding of sums in another order, which grows over the steps.

        A missing image or gradient would change the losses by percents.
        """
        found = distances(tree, self.tree)
        assert {name: value for name, value in found.items() if value > TIMES * self.rounding[name]} == {}


@pytest.fixture(scope="module")
def pairs_tree(pairs_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With augmentation, which gives the network a layer that the model does not have."""
    return trees.copy(pairs_tree, tmp_path_factory.mktemp("augmented") / "tree", augment=0.2)


@pytest.fixture(scope="module")
def alone(pairs_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    made = []
    for accumulate in (1, 4):
        made.append(trees.copy(pairs_tree, tmp_path_factory.mktemp("alone") / "tree", accumulate=accumulate))
        done = trees.run(made[-1])
        assert done.returncode == 0, done.stderr
    rounding = distances(made[1], made[0])
    assert all(0 < value < 1e-2 for value in rounding.values()), rounding
    return Alone(made[0], rounding)


@pytest.fixture(scope="module")
def two(pairs_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training with two processes."""
    tree = trees.copy(pairs_tree, tmp_path_factory.mktemp("two") / "tree", processes=2)
    done = trees.run_apart(tree, *trees.TRAIN)
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr
    assert done.stderr.count("step 40: held-out MSE") == 1
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return tree


def test_two_processes_train_the_model_of_one(alone: Alone, two: Path) -> None:
    alone.assert_same_as(two)


def test_two_processes_with_sharded_weights_train_it_too(alone: Alone, pairs_tree: Path, tmp_path: Path) -> None:
    """Interrupted training, which ends all processes with one line; all start from the same weights in a file."""
    options = {"processes": 2, "sharding": "weights", "accumulate": 2, "keep_best": True, "recompute": True}
    tree = trees.copy(pairs_tree, tmp_path / "tree", **options)
    trees.save_initial_weights(tree, "initial")
    trees.change(tree, {"train": {"start_from": "initial"}})
    with trees.start(tree) as stopped:
        trees.wait_for(stopped, "step 20: held-out")
        stopped.send_signal(signal.SIGINT)
        _, rest = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signal.SIGINT, rest
    assert [line for line in rest.splitlines() if not line.startswith("train: ")] == ["ddpm train: stopped by SIGINT"]
    assert rest.endswith("ddpm train: stopped by SIGINT\n")
    done = trees.run_apart(tree, *trees.TRAIN)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    alone.assert_same_as(tree)


def kill(launcher: int, rank: int) -> None:
    """Kill the launcher's process of this rank."""
    for worker in psutil.Process(launcher).children():
        if worker.environ().get("RANK") == str(rank):
            worker.kill()


def test_a_lost_process_is_replaced_and_the_result_is_the_same(two: Path, pairs_tree: Path, tmp_path: Path) -> None:
    """Also if one of them compares the samples of previews, with features that are trained once."""
    tree = trees.copy(pairs_tree, tmp_path / "tree", processes=2)
    with trees.start(tree, DDPM_PREVIEW_QUALITY="32", **trees.seconds(0)) as process:
        before = trees.read_to(process, "step 20: held-out")
        kill(process.pid, rank=1)
        restarted = trees.read_to(process, "resuming from the checkpoint")
        _, rest = process.communicate(timeout=120)
    assert process.returncode == 0, rest
    found = re.fullmatch(
        r"train: process 1 of 2 was killed by SIGKILL; resuming from the checkpoint at step (\d+) \(restart 1 of 3\)\n",
        restarted[-1],
    )
    assert found is not None, restarted
    assert f", resuming from step {found[1]}\n" in rest
    said = "".join([*before, *restarted, rest])
    assert "Traceback" not in said
    assert len(re.findall(r"step 40: held-out MSE .*, KID .*, Fréchet distance ", rest)) == 1
    assert said.count("400/400 steps") == 1  # of training the features
    assert trees.digests(tree, "models", "reports") == trees.digests(two, "models", "reports")


def test_processes_lost_too_often_end_the_training(pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree", processes=2, steps=100_000, preview_every=20)
    with trees.start(tree, DDPM_MAX_RESTARTS="1") as process:
        trees.wait_for(process, "step 20: held-out")
        kill(process.pid, rank=0)
        trees.wait_for(process, "resuming from the checkpoint")
        trees.wait_for(process, "parameters, ")
        workers = psutil.Process(process.pid).children()
        kill(process.pid, rank=0)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 1
    assert rest.endswith(
        "ddpm train: error: process 0 of 2 was killed by SIGKILL; `dvc repro` resumes from the last checkpoint\n"
    )
    assert "Traceback" not in rest
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)


def test_sigterm_after_a_restart_stops_with_a_checkpoint(pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree", processes=2, steps=100_000, preview_every=20)
    with trees.start(tree) as process:
        trees.wait_for(process, "step 20: held-out")
        kill(process.pid, rank=1)
        trees.wait_for(process, "step 40: held-out")
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert [line for line in rest.splitlines() if not line.startswith("train: ")] == ["ddpm train: stopped by SIGTERM"]
    assert rest.endswith("ddpm train: stopped by SIGTERM\n")
    assert max(int(path.stem) for path in tree.glob(".ddpm/checkpoints/*/0*.json")) >= 40


def test_an_error_that_the_processes_report_is_reported_once(pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree", processes=2)
    with trees.start(tree, **trees.seconds(-1)) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("ddpm train: error: DDPM_CHECKPOINT_SECONDS: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("early", [False, True])
def test_killing_the_launcher_ends_its_processes(pairs_tree: Path, tmp_path: Path, early: bool) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree", processes=2, steps=100_000, preview_every=20)
    with trees.start(tree) as process:
        if not early:
            trees.wait_for(process, "step 20: held-out")
        launcher = psutil.Process(process.pid)
        while len(workers := launcher.children()) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert early or list(tree.glob(".ddpm/checkpoints/*/*.safetensors"))


TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
RESULTS = ("models", "reports/train_curves")
"""Everything that must not depend on train.processes."""


def test_torchrun_replaces_a_lost_process(two: Path, pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    where = ["--nproc-per-node=2", f"--master-port={free_port()}", "--max-restarts=1"]
    more = trees.seconds(0) | {"GLOO_SOCKET_IFNAME": "lo"}
    with trees.start(tree, TORCHRUN, *where, "-m", "flows", "train", **more) as process:
        trees.wait_for(process, "step 20: held-out")
        kill(process.pid, rank=1)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert ", resuming from step" in errors
    assert trees.digests(tree, *RESULTS) == trees.digests(two, *RESULTS)


def test_torchrun_replaces_a_lost_process_on_one_of_two_machines(
    alone: Alone, two: Path, pairs_tree: Path, tmp_path: Path
) -> None:
    """Two launchers with separate trees simulate two machines without a shared file system."""
    machines = [trees.copy(pairs_tree, tmp_path / name) for name in ("first", "second")]
    where = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1"]
    where += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    more = trees.seconds(0) | {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with ExitStack() as running:
        launchers = []
        for address, tree in zip(("127.0.0.1", "127.0.0.2"), machines, strict=True):
            command = [TORCHRUN, *where, f"--local-addr={address}", "-m", "flows", "train"]
            launchers.append(running.enter_context(trees.start(tree, *command, **more)))
        trees.wait_for(launchers[0], "step 20: held-out")
        kill(launchers[1].pid, rank=1)
        trees.wait_for(launchers[0], ", resuming from step")
        for process in launchers:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    alone.assert_same_as(machines[0])
    assert trees.digests(machines[0], *RESULTS) == trees.digests(two, *RESULTS)
    assert not (machines[1] / "models").exists()
    assert not (machines[1] / ".ddpm").exists()


def test_nodes_of_one_job_train_together(two: Path, pairs_tree: Path, tmp_path: Path) -> None:
    """Two processes act as pods, of which the second is stopped when the first has ended, as by Kubernetes."""
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    command = [sys.executable, "-m", "flows.nodes", "--nodes=2", "--folder=../job", "--address=127.0.0.1", *trees.TRAIN]
    (tmp_path / "elsewhere").mkdir()
    with trees.start(tmp_path / "elsewhere", *command, JOB_COMPLETION_INDEX="1", GLOO_SOCKET_IFNAME="lo") as second:
        with trees.start(tree, *command, JOB_COMPLETION_INDEX="0", GLOO_SOCKET_IFNAME="lo") as first:
            trees.wait_for(first, "on 2 x cpu")
            below = psutil.Process(second.pid).children(recursive=True)
            _, errors = first.communicate(timeout=180)
        assert first.returncode == 0, errors
        second.terminate()
        assert second.wait(60) == 128 + signal.SIGTERM
    assert len(below) == 2  # torch's launcher, and the process that trains
    assert not psutil.wait_procs(below, timeout=30)[1]
    assert trees.digests(tree, *RESULTS) == trees.digests(two, *RESULTS)
    assert not [path for path in (tree / ".ddpm/checkpoints").iterdir() if path.is_dir()]  # of any number of nodes
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("auto", 3, "train.processes: 3 processes need a GPU each (available: 2); set it to 2"),
        ("cuda:1", 2, "device: cuda:1 is one GPU, but train.processes is 2; set device to cuda"),
    ],
)
def test_each_process_needs_its_own_gpu(
    params: Params, monkeypatch: pytest.MonkeyPatch, device: str, processes: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe: Any = SimpleNamespace(stage="train", options=params.train.model_copy(update={"processes": processes}))
    with pytest.raises(UserError, match=re.escape(message)):
        check_devices(params.model_copy(update={"device": device}), recipe, torch.device("cuda", 0))
    check_devices(params.model_copy(update={"device": "cuda"}), recipe, torch.device("cpu"))


def test_an_error_of_all_processes_is_reported_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulates rank 1 of two processes, which raises the error reported by rank 0."""

    def ends_with(error: Exception, rank: int, lost: type[UserError] = UserError) -> type[BaseException]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        for name in ("init_process_group", "destroy_process_group", "barrier"):
            monkeypatch.setattr(dist, name, lambda *_, **__: None)
        with pytest.raises(type(error)) as raised, process_group(torch.device("cpu"), tmp_path / "store", lost):
            raise error
        return raised.type

    assert ends_with(UserError("diverged"), rank=0) is UserError
    assert ends_with(UserError("diverged"), rank=1) is AlreadyReported
    with pytest.raises(AlreadyReported, match=r"process 1 of 2 lost its connection .*Connection closed by peer"):
        ends_with(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1\nmore"), rank=1, lost=AlreadyReported)
    with pytest.raises(UserError) as raised:  # torchrun does not report it
        ends_with(RuntimeError("[gloo] Connection closed by peer"), rank=1)
    assert raised.type is UserError
    assert ends_with(RuntimeError("gloo: no such interface"), rank=1) is RuntimeError
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as status:
        ends_with(torch.AcceleratorError("CUDA error: uncorrectable ECC error\nmore"), rank=1)
    assert status.value.code == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "train: process 1 of 2 lost its GPU (CUDA error: uncorrectable ECC error)\n"


def test_restarts_by_torchrun_on_several_machines_need_a_new_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it they would wait for addresses of processes that have ended."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1"}
    for name, value in (environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    message = "needs --rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment"
    with pytest.raises(UserError, match=message), process_group(torch.device("cpu")):
        pass


def test_a_batch_that_cannot_be_shared_out_is_refused(pairs_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree", processes=3)
    done = trees.run(tree)
    assert done.returncode == 1
    assert "train: batch_size (32) must be a multiple of processes x accumulate (3)" in done.stderr
    assert done.stderr.count("\n") == 1
