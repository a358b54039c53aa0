"""The command line: arguments, help and output; what the commands do is tested beside their modules."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from diffusion.errors import AlreadyReported, LostConnection
from flows import params as parameters
from flows.__main__ import main
from flows.cli import app

ROOT = Path(__file__).parents[2]
WRONG = object()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("runs x", "ddpm runs: error: unexpected argument 'x'. See `ddpm runs --help`."),
        ("sample --from", "ddpm sample: error: --from is missing its value. See `ddpm sample --help`."),
        ("apply", "ddpm apply: error: RUN is missing. See `ddpm apply --help`."),
        ("import x", "ddpm import: error: --name is missing. See `ddpm import --help`."),
        ("promote 1 --reason", "ddpm promote: error: --reason is missing its value. See `ddpm promote --help`."),
        ("runs --jsn", "ddpm runs: error: Unknown option: --jsn. See `ddpm runs --help`."),
        (
            "triton x --max-batch 1e3",
            "ddpm triton: error: Invalid value for --max-batch: '1e3' is not an integer. See `ddpm triton --help`.",
        ),
    ],
)
def test_wrong_arguments_get_one_line(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert main(arguments.split()) == 2
    assert capsys.readouterr().err == f"{message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--model", ""], "ddpm sample: error: --model: must not be empty"),
        (["sample", "--from="], "ddpm sample: error: --from: must not be empty"),
        (["import", "", "--name", "x"], "ddpm import: error: an argument: must not be empty"),
        ([""], "ddpm: error: an argument: must not be empty"),
    ],
)
def test_no_argument_may_be_empty(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{message}\n"


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-"])
def test_closed_streams_do_not_stop_a_command(tmp_path: Path, closed: str) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    shutil.copytree(ROOT / "data" / "raw", tmp_path / "data" / "raw")
    done = subprocess.run(
        f"{sys.executable} -m flows set seed=1 {closed} && {sys.executable} -m flows shard {closed}",
        shell=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0
    assert "\nseed: 1\n" in (tmp_path / "params.yaml").read_text()
    assert (tmp_path / "data" / "shards" / "manifest.json").exists()


@pytest.mark.parametrize(("error", "status"), [(AlreadyReported, 1), (LostConnection, os.EX_UNAVAILABLE)])
def test_what_another_process_reports_is_not_said_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[AlreadyReported], status: int
) -> None:
    """The launcher tells by the status what was lost."""
    monkeypatch.setattr("flows.commands.stage.run", Mock(side_effect=error("lost")))
    assert main(["train"]) == status
    assert capsys.readouterr().err == ""


def test_without_a_command_it_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "export-diffusers" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["params"], ["--help"], [], ["set", "seed=1"]])
def test_output_that_cannot_be_written_gets_one_line(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "flows", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    name = f"ddpm {arguments[0]}" if arguments and arguments != ["--help"] else "ddpm"
    assert (done.returncode, done.stderr) == (1, f"{name}: error: standard output: no space left\n")


@pytest.mark.parametrize(
    ("option", "text", "right"),
    [
        ("steps", "10", 10),
        ("steps", "1_0", WRONG),
        ("steps", "10.0", WRONG),
        ("steps", "true", WRONG),
        ("steps", "010", WRONG),
        ("steps", "'10'", WRONG),
        ("seed", "1_0", WRONG),
        ("at", "0x10", WRONG),
        ("eta", "1", 1.0),
        ("eta", "0.5", 0.5),
        ("eta", "1_0.5", WRONG),
        ("eta", "true", WRONG),
        ("eta", "x", WRONG),
    ],
)
def test_numbers_on_the_command_line_are_as_strict(
    option: str, text: str, right: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", f"--{option}={text}"]
    if right is WRONG:
        assert main(arguments) == 2
        assert f"ddpm sample: error: Invalid value for --{option}: " in capsys.readouterr().err
    else:
        _, bound, _ = app.parse_args(arguments, exit_on_error=False)
        options = bound.arguments["editing" if option == "at" else "overrides"]
        assert (type(getattr(options, option)), getattr(options, option)) == (type(right), right)


def test_ddpm_params_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params"]) == 0
    shown = capsys.readouterr().out
    for name, section in parameters.SECTIONS.items():
        assert f"\n{name}  " in shown
        assert all(f"\n{name}.{field} = " in shown for field in section.model_fields if name != "network")


def test_ddpm_params_shows_value_default_choices_and_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    assert main(["set", "train.steps=7", "train.decay=cosine", "sample.sampler=ddim", "network.kind=uvit"]) == 0
    capsys.readouterr()
    expected = {
        "train.steps": "train.steps = 7 (default 1000)   integer, at least 0",
        "train.decay": "train.decay = cosine (default linear)   constant | linear | cosine",
        "train.ema.width": "train.ema.width = 0.05 (default)   number, at least 0.001 and below 0.288",
        "train.ema.decay": "train.ema.decay (default 0.9999)   number, at least 0 and below 1",
        "train.augment": "train.augment = auto (default)   auto | number, at least 0 and below 1",
        "train.compile": "train.compile = auto (default)   true | false | auto",
        "process.loss": "process.loss = mse (default)   mse | l1 | huber",
        "process.weighting.gamma": "process.weighting.gamma (default 5.0)   number, above 0",
        "sample.sampler.eta": "sample.sampler.eta = 0.0 (default)   number, at least 0 and at most 1",
        "network.kind": "network.kind = uvit (default unet)   unet | uvit",
        "network.depth": "network.depth = 13 (default)   integer, at least 1",
        "evaluate.exact_likelihood_images": "evaluate.exact_likelihood_images = 16 (default)   integer, at least 2",
        "export.variants": "export.variants = [] (default)   list of fp16 | int8",
        "device": "device = auto (default)   auto | cpu | cuda | cuda:N | mps | xpu | xpu:N",
    }
    for name, line in expected.items():
        assert main(["params", name]) == 0
        assert line in map(str.strip, capsys.readouterr().out.splitlines())
    assert main(["params", "network"]) == 0
    shown = capsys.readouterr().out
    assert "network.channel_multipliers (default [1, 2])" in shown  # of the other kind: no value
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("steps: 7\n", "steps: -7\n"))
    assert main(["params", "train.steps"]) == 1
    shown, error = capsys.readouterr()
    assert "train.steps = -7 (default 1000)" in shown
    assert "train.steps: input should be greater than or equal to 0 (got -7)" in error
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("decay: cosine", "decay: 2020-01-01"))
    assert main(["params", "train.decay"]) == 1
    shown, error = capsys.readouterr()
    assert 'train.decay = "2020-01-01" (default linear)' in shown
    assert "(got 2020-01-01)" in error
    Path("params.yaml").unlink()
    assert main(["params", "train.steps"]) == 0
    assert capsys.readouterr().err == "params.yaml: no such file here; these are the defaults\n"
    assert main(["params", "trains"]) == 2
    assert capsys.readouterr().err == (
        "ddpm params: error: trains: no such parameter or section; available: seed, device, shard, pairs, "
        "process, network, train, sample, evaluate, export, distill, tracking\n"
    )
