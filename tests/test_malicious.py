"""Files made to run code, to read other files, or to fill memory: each is refused in one line, and nothing happens.

Further ones are tested beside their readers: links and names in archives (tests/sources/test_archives.py), pictures
that point elsewhere or decode to more than fits (test_refused_images.py, test_images.py), pickles of diffusers
(tests/exchange/test_refusals.py), weights outside an ONNX file of features (tests/evaluation/test_features.py).
"""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.service.models import Model as Served
from deploy.service.models import RejectedModel
from diffusion.errors import UserError
from diffusion.export import digest
from diffusion.sources.images import Unreadable
from diffusion.sources.sources import open_source
from diffusion.storage.files import sha256, write_sums
from diffusion.training.checkpoints import _digest
from tests.command import ddpm
from tests.fuzz import IMAGES
from tests.training import trees

TRAP = "trap-has-run"


class Trap:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (TRAP,)


PICKLE = pickle.dumps(Trap())
HUGE_HEADER = struct.pack("<Q", 2**62) + b"{}"
"""Of safetensors: it asks for a header of 4 EB."""


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob(TRAP))


def refusal(tree: Path, *command: str) -> str:
    """The line with which a command refuses."""
    done = ddpm(tree, *command, environment=trees.ENVIRONMENT)
    assert (done.returncode, done.stdout) == (1, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"ddpm {command[0]}: error: ")
    assert "Traceback" not in done.stderr
    return line.partition(": error: ")[2]


def arrays(**content: bytes) -> bytes:
    """An .npz file with these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, member in content.items():
            archive.writestr(f"{name}.npy", member)
    return buffer.getvalue()


def of_objects() -> bytes:
    """An .npy file of pickled objects."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap()] * 40, dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_the_trap_works(tmp_path: Path) -> None:
    np.load(io.BytesIO(of_objects()), allow_pickle=True)
    assert (tmp_path / TRAP).is_dir()
    (tmp_path / TRAP).rmdir()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("images.npy", of_objects()),
        ("images.npy", PICKLE),
        ("images.npz", arrays(images=of_objects())),
        ("images.npz", arrays(images=PICKLE)),
        ("images.npz", PICKLE),
    ],
)
def test_arrays_of_objects(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{name}: ") as caught:
        list(open_source(Path(name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [PICKLE, HUGE_HEADER])
def test_weights(whole_tree: Path, tmp_path: Path, content: bytes) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(whole_tree, tree)
    (tree / "models/ddpm/model.safetensors").write_bytes(content)
    write_sums(tree / "models/ddpm")
    line = refusal(tree, "sample", "--count", "1")
    assert (
        line == "models/ddpm/model.safetensors: does not match the network in config.json; `dvc repro train` writes it"
    )


@pytest.mark.parametrize("content", [PICKLE, HUGE_HEADER])
def test_a_checkpoint(pairs_tree: Path, tmp_path: Path, content: bytes) -> None:
    """With the digest that belongs to it: whoever can write there can compute it."""
    tree = tmp_path / "tree"
    shutil.copytree(pairs_tree, tree)
    trees.stopped(tree, 3)
    weights = max((tree / ".ddpm/checkpoints").glob("*/*.safetensors"))
    record = json.loads(weights.with_suffix(".json").read_text())
    weights.write_bytes(content)
    record["sha256"] = _digest(content, record["facts"])
    weights.with_suffix(".json").write_text(json.dumps(record))
    done = trees.run(tree)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "corrupt" in line]
    assert line.startswith("train: checkpoint 0000000003 is corrupt (")


@pytest.fixture(params=["../secret", "secret"])
def outside(whole_tree: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A sampler.onnx whose weights are in a file above its folder, or in the current one."""
    (tmp_path / "models").mkdir()
    model = onnx.load(whole_tree / "models/onnx/sampler.onnx")
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    entries = {"location": request.param, "offset": "0", "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "models/sampler.onnx"
    path.write_bytes(digest.seal(model.SerializeToString()))
    return path


def test_onnx_with_weights_in_another_file(outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "models"):  # it is not found by way of the current folder either
        monkeypatch.chdir(folder)
        assert "no ONNX model that can be run" in refusal(folder, "verify-onnx", str(outside))
        with pytest.raises(RejectedModel) as caught:
            Served(outside.read_bytes(), None)
        assert "\n" not in str(caught.value)


def test_a_tar_with_devices_and_a_name_elsewhere(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        kinds = {"../up": tarfile.REGTYPE, "null": tarfile.CHRTYPE, "disk": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE}
        for name, kind in kinds.items():
            member = tarfile.TarInfo(f"{name}.png")
            member.type, member.devmajor, member.devminor = kind, 1, 3
            archive.addfile(member)
        member = tarfile.TarInfo("good.png")
        member.size = len(IMAGES["png"])
        archive.addfile(member, io.BytesIO(IMAGES["png"]))
    reasons = {}
    for sample in open_source(Path("a.tar")):
        if sample.rejected:
            reasons[sample.file] = sample.rejected
            continue
        try:
            sample.decode()
        except Unreadable as error:
            reasons[sample.file] = str(error)
    device = "a link or device in an archive; only regular files are read"
    assert reasons.pop("../up.png").startswith("its name is empty, or leads out of the archive")
    assert reasons == dict.fromkeys(["null.png", "disk.png", "pipe.png"], device)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
"""Ten to the power of twelve, written out."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "params.yaml: aliases (*name) of sections and lists are not supported: write the values out"),
        (
            f"seed: !!python/object/apply:os.mkdir [{TRAP}]\n",
            "params.yaml: tags (tag:yaml.org,2002:python/object/apply",
        ),
        (
            f"seed: !!python/object/new:os.mkdir\n  args: [{TRAP}]\n",
            "params.yaml: tags (tag:yaml.org,2002:python/object",
        ),
    ],
)
def test_params_yaml(tmp_path: Path, text: str, message: str) -> None:
    for place in ("params.yaml", "model-card.md", "data/licenses.yaml"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    started = time.process_time()
    assert refusal(tmp_path, "params").startswith(message)
    assert time.process_time() - started < 5
    assert sha256(tmp_path / "params.yaml")
