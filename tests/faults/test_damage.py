"""A flipped bit in any file that one stage reads from another is detected, and the error names the file."""

import json
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from diffusion.errors import UserError
from flows import made_with
from flows import params as parameters
from flows.__main__ import main
from flows.paths import Paths
from flows.stages import STAGES
from tests.training import trees

pytestmark = pytest.mark.slow

READERS = {
    "data/shards/manifest.json": ["pairs", "evaluate", "track"],
    "data/shards/train-000000.tar": ["pairs"],
    "data/pairs/manifest.json": ["train", "evaluate", "export", "track"],
    "data/pairs/train-000000.tar": ["train", "evaluate"],
    "data/pairs/val-000000.tar": ["train", "export"],
    "data/pairs/test-000000.tar": ["evaluate", "export"],
    "models/ddpm/config.json": ["evaluate", "export", "sample", "export-diffusers out", "track"],
    "models/ddpm/model.safetensors": ["evaluate", "export", "sample", "export-diffusers out", "track"],
    "reports/data.html": ["track"],
    "reports/train.json": ["evaluate", "track"],
    "reports/train_curves/loss.csv": ["evaluate", "track"],
    "reports/train_curves/heldout.csv": ["evaluate", "track"],
    "reports/previews/step-00000040.png": ["track"],
    "reports/previews/step-00000020.png": ["track"],
    "reports/evaluate.json": ["export", "track", "report"],
    "reports/report.html": ["track"],
    "reports/evaluation/scored.json": ["export", "track", "report"],
    "reports/evaluation/val_errors.csv": ["track", "report"],
    "reports/evaluation/bands.csv": ["track"],
    "reports/evaluation/mse_by_t.csv": ["track"],
    "reports/evaluation/vlb_by_t.csv": ["track"],
    "reports/evaluation/mse_by_t.png": ["track"],
    "reports/evaluation/vlb_by_t.png": ["track"],
    "reports/evaluation/samples.png": ["track"],
    "reports/evaluation/filmstrip.png": ["track"],
    "reports/evaluation/training.png": ["track", "report"],
    "reports/evaluation/bits_per_dim.csv": ["track", "report"],
    "reports/evaluation/heldout.png": ["track"],
    "reports/evaluation/nearest.png": ["track"],
    "reports/evaluation/quality.csv": ["track", "report"],
    "reports/evaluation/noising.png": ["track"],
    "reports/export.json": ["track"],
    "models/onnx/denoiser.onnx": ["triton out", "verify-onnx models/onnx/denoiser.onnx", "track"],
    "models/onnx/README.md": ["track"],
    "models/onnx/denoiser_int8.onnx": ["verify-onnx models/onnx/denoiser_int8.onnx", "track"],
    "models/onnx/sampler_int8.onnx": ["verify-onnx models/onnx/sampler_int8.onnx", "track"],
    "models/onnx/sampler.onnx": ["triton out", "verify-onnx models/onnx/sampler.onnx", "track"],
}
"""Every such file and its readers. The service has separate tests."""
CASES = [(file, command) for file, commands in READERS.items() for command in commands]


@pytest.fixture(scope="module")
def finished(whole_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tree after all stages, as the working directory; tests undo their changes."""
    tree = trees.copy(whole_tree, tmp_path_factory.mktemp("finished") / "tree")
    before = signal.getsignal(signal.SIGTERM)  # a finished stage leaves it ignored
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        patch.setenv("MLFLOW_TRACKING_URI", trees.ENVIRONMENT["MLFLOW_TRACKING_URI"])
        yield tree
    signal.signal(signal.SIGTERM, before)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize(("file", "command"), CASES, ids=[" by ".join(case) for case in CASES])
def test_a_flipped_bit_gives_one_line_that_names_the_file(
    finished: Path, file: str, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path, kept = finished / file, [part for part in ("models", "reports", "data") if (finished / part).exists()]
    content, pick = path.read_bytes(), random.Random(file + command)
    try:
        flip(path, pick.randrange(8 * len(content)))
        capfd.readouterr()
        assert main(command.split()) == 1
    finally:
        path.write_bytes(content)
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith(f"ddpm {command.split()[0]}: error: {file}: ")
    assert "damaged" in lines[-1] or "ddpm.sha256" in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not (finished / "out").exists()
    assert not (finished / "samples.png").exists()
    assert [part for part in ("models", "reports", "data") if (finished / part).exists()] == kept


def test_every_file_read_is_covered(finished: Path) -> None:
    """Fails if a stage writes a file that this module does not cover."""
    unread = {"data/shards/val-000000.tar", "data/shards/test-000000.tar"}  # read like the train shards
    unread |= {f"reports/made_with/{stage}.json" for stage in STAGES}  # see the test below
    found = {
        path.relative_to(finished).as_posix()
        for part in ("data/shards", "data/pairs", "models", "reports")
        for path in (finished / part).rglob("*")
        if path.is_file() and path.name != "SHA256SUMS"
    }
    assert found == READERS.keys() | unread


@pytest.mark.parametrize("stage", STAGES)
def test_a_flipped_bit_in_a_record_never_validates_results(finished: Path, stage: str) -> None:
    """Records are compared with parameters and files, so no flipped bit makes other results match."""
    paths, file = Paths(), finished / "reports" / "made_with" / f"{stage}.json"
    params = parameters.load(paths.params)
    assert made_with.difference(paths, stage, params) is None
    content, pick = file.read_bytes(), random.Random(stage)
    same = []
    try:
        for byte in range(len(content)):
            flip(file, 8 * byte + pick.randrange(8))
            with suppress(UserError):
                if made_with.difference(paths, stage, params) is None:
                    same.append(json.loads(file.read_bytes()))
            file.write_bytes(content)
    finally:
        file.write_bytes(content)
    assert all(record == json.loads(content) for record in same)  # 1e-05 and 1E-05
