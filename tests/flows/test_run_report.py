"""`ddpm report` and `ddpm compare`."""

import json
import shutil
import sys
import webbrowser
from pathlib import Path

import pytest

from diffusion.storage.files import write_json
from flows import run_report, yaml_files
from flows.gate import Row
from flows.summary import StageSummary, Summary
from flows.summary import write as write_summary
from flows.workspace import Run
from tests.command import ddpm
from tests.flows.pages.test_report import check_alone, write_figures
from tests.training import trees

pytestmark = pytest.mark.slow
REVISION = "c866cb9ab911ed80ac2ffea6334c82d234593b15"
ENVIRONMENT = {"DISPLAY": "", "WAYLAND_DISPLAY": ""}


@pytest.fixture
def tree(whole_tree: Path, tmp_path: Path) -> Path:
    """A working tree with results, and two finished runs with the same and with other results."""
    tree = Path(shutil.copytree(whole_tree, tmp_path / "tree"))
    for name, steps in (("bold-ape", 40), ("calm-bee", 80)):
        workspace = Path(shutil.copytree(whole_tree, tree / ".ddpm/runs" / name))
        started, ended = "2026-11-27T19:39:04.380+00:00", "2026-11-27T19:40:05.344+00:00"
        Run(name, "id", started, REVISION, name == "bold-ape", "completed", ended).write(workspace)
        record = workspace / "reports/made_with/train.json"
        document = json.loads(record.read_text())
        write_json(record, document | {"params": document["params"] | {"train.steps": steps}})
    stages = [StageSummary("train", 31.84, "run"), StageSummary("evaluate", 10.0, "cached")]
    rule = Row("val MSE", "significantly lower", 0.0, 0.125, 0.25, -0.125, -0.2, -0.05, "met", "val MSE is lower")
    summary = Summary("bold-ape", stages, {}, "", "", "", [rule._asdict()])
    write_summary(tree / ".ddpm/runs/bold-ape", summary)
    return tree


def test_the_report_of_a_run(tree: Path) -> None:
    before = (tree / ".ddpm/runs/bold-ape/reports/report.html").read_bytes()
    done = ddpm(tree, "report", "bold", environment=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    path = tree / done.stdout.strip()
    assert path == tree / ".ddpm/runs/bold-ape/reports/run.html"
    text = check_alone(path.read_text())
    for words in (
        "Report – digits – bold-ape",
        "Started 2026-11-27 19:39, ended 2026-11-27 19:40 (UTC); completed; code: revision c866cb9ab911 with",
        "train 31.8 run",
        "evaluate 10.0 cached",
        "Promoted to champion: val MSE is lower.",
        "val MSE significantly lower 0.1250 0.2500 -0.1250 -0.2000 to -0.0500 met",
        f"git checkout {REVISION} # it had uncommitted changes: its code is in .ddpm/runs/bold-ape",
        "ddpm apply bold-ape",
        "dvc repro",
        "tracking.gate",
        "sampler_int8.onnx",
    ):
        assert words in text
    record = json.loads((tree / ".ddpm/runs/bold-ape/reports/made_with/export.json").read_text())
    for name, digest in (record["read"] | record["wrote"]).items():
        assert f"{name} {digest}" in text
    assert (tree / ".ddpm/runs/bold-ape/reports/report.html").read_bytes() == before  # which DVC keeps


def test_the_report_of_the_working_tree(tree: Path) -> None:
    done = ddpm(tree, "report", environment=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, "reports/run.html\n")
    text = check_alone((tree / "reports/run.html").read_text())
    assert "The results in the working tree." in text
    assert "Changed since" not in text
    assert "git checkout" not in text


def test_a_report_of_the_working_tree_names_the_parameters_changed_since(tree: Path) -> None:
    trees.change(tree, {"train": {"steps": 77}, "sample": {"guidance": 7.5}})
    assert ddpm(tree, "report", environment=ENVIRONMENT).returncode == 0
    text = check_alone((tree / "reports/run.html").read_text())
    assert "The results in the working tree. Changed since in params.yaml: sample.guidance, train.steps." in text


def test_a_short_form_of_the_same_parameters_is_no_change(tree: Path) -> None:
    record = json.loads((tree / "reports/made_with/evaluate.json").read_text())
    record["params"]["evaluate.samplers"] = [{"sampler": {"kind": "ddim", "eta": 0.0}, "steps": 5}]
    write_json(tree / "reports/made_with/evaluate.json", record)
    trees.change(tree, {"evaluate": {"samplers": [{"sampler": "ddim", "steps": 5}]}})
    assert ddpm(tree, "report", environment=ENVIRONMENT).returncode == 0
    assert "Changed since" not in (tree / "reports/run.html").read_text()
    trees.change(tree, {"evaluate": {"samplers": [{"sampler": "ddim", "steps": 6}]}})
    assert ddpm(tree, "report", environment=ENVIRONMENT).returncode == 0
    assert "Changed since in params.yaml: evaluate.samplers." in (tree / "reports/run.html").read_text()


def test_a_report_shows_the_parameters_that_the_stages_ran_with(tree: Path) -> None:
    """params.yaml may have been changed, or lost, since."""
    before = yaml_files.read_yaml(tree / "params.yaml")["sample"]["steps"]
    trees.change(tree, {"sample": {"steps": before + 3}, "train": {"optimizer": {"kind": "sgd", "momentum": 0.25}}})
    for document in ((tree / "params.yaml").read_bytes(), b"{}", b"sample: 1"):
        (tree / "params.yaml").write_bytes(document)
        done = ddpm(tree, "report", environment=ENVIRONMENT)
        assert (done.returncode, done.stderr) == (0, "")
        text = check_alone((tree / "reports/run.html").read_text())
        assert f"{before} steps, spacing" in text
        assert f"sample.steps {before} 50" in text
        assert "momentum" not in text
    assert "params.yaml is not valid now" in text


def test_a_report_of_an_imported_model_shows_no_training(tree: Path) -> None:
    (tree / "reports/train.json").unlink()
    shutil.rmtree(tree / "reports/train_curves")
    done = ddpm(tree, "report", environment=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    text = check_alone((tree / "reports/run.html").read_text())
    assert "train.steps" not in text
    assert "network.base_channels 8" in text
    assert "trained for" not in text


def test_what_cannot_be_shown_is_refused(tree: Path) -> None:
    done = ddpm(tree, "report", "nobody", environment=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr == "ddpm report: error: run 'nobody': not found; available: bold-ape, calm-bee\n"
    (tree / ".ddpm/runs/calm-bee/reports/evaluate.json").unlink()
    done = ddpm(tree, "report", "calm-bee", environment=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr == "ddpm report: error: run 'calm-bee': it has no evaluation to show; its state is completed\n"
    export = tree / ".ddpm/runs/bold-ape/reports/export.json"
    for damaged in (b"", b"[1]", b"{}", b"\xff"):
        export.write_bytes(damaged)
        done = ddpm(tree, "report", "bold-ape", environment=ENVIRONMENT)
        assert (done.returncode, done.stdout) == (1, "")
        assert "bold-ape/reports/export.json: damaged (it is not what export writes)" in done.stderr
    export.unlink()
    record = tree / ".ddpm/runs/bold-ape/reports/made_with/evaluate.json"
    record.write_text('{"params": []}')
    done = ddpm(tree, "report", "bold-ape", environment=ENVIRONMENT)
    assert done.returncode == 1
    assert "bold-ape/reports/made_with/evaluate.json: damaged (it is not what a stage writes)" in done.stderr
    record.unlink()
    (tree / ".ddpm/runs/bold-ape/params.yaml").write_text("{}")
    for command in (["report", "bold-ape"], ["compare", "bold-ape", "."]):
        done = ddpm(tree, *command, environment=ENVIRONMENT)
        assert (done.returncode, done.stdout) == (1, "")
        assert "bold-ape/params.yaml: lacks sample.sampler, " in done.stderr
    shutil.copy(tree / "params.yaml", tree / ".ddpm/runs/bold-ape/params.yaml")
    (tree / ".ddpm/runs/bold-ape/reports/evaluation/mse_by_t.csv").unlink()
    done = ddpm(tree, "report", "bold-ape", environment=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "bold-ape/reports/evaluation/mse_by_t.csv: No such file or directory" in done.stderr
    (tree / "reports/evaluate.json").unlink()
    done = ddpm(tree, "report", environment=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr.startswith("ddpm report: error: reports/evaluate.json: missing; `dvc repro evaluate` writes it")
    assert not (tree / "reports/run.html").exists()


@pytest.mark.parametrize(
    ("terminal", "display", "opened"), [(True, ":0", True), (True, "", False), (False, ":0", False)]
)
def test_a_page_is_opened_only_where_someone_sees_it(
    terminal: bool, display: str, opened: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", asked.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    run_report.open_page(tmp_path / "a page.html")
    assert asked == [f"file://{tmp_path}/a%20page.html"] * opened


def test_runs_side_by_side(tree: Path) -> None:
    other = tree / ".ddpm/runs/calm-bee"
    figures = json.loads((other / "reports/evaluate.json").read_text())
    write_figures(other, figures | {name: figures[name] / 2 for name in figures if name.startswith("mse")})
    done = ddpm(tree, "compare", "bold", "calm", ".", environment=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["bold-ape", "calm-bee", "working", "tree"]
    (mse,) = [line for line in lines if line.startswith("MSE on test")]
    assert f"{figures['mse']:.4f}" in mse
    assert f"{figures['mse'] / 2:.4f} (better)" in mse
    assert f"{figures['mse']:.4f} (equal)" in mse
    assert lines[-1] == "reports/compare.html"
    text = check_alone((tree / "reports/compare.html").read_text())
    assert "train.steps 40 80 40" in text
    assert "train.batch_size" not in text
    assert "equal (paired)" in text
    assert "start from the same noise (seed 0)." in text
    assert (tree / "reports/compare.html").read_text().count('src="data:image/png') == 3


def test_a_comparison_can_be_written_elsewhere(tree: Path) -> None:
    done = ddpm(tree, "compare", "bold", "calm", "--out", "there/page.html", environment=ENVIRONMENT)
    assert done.returncode == 0
    check_alone((tree / "there/page.html").read_text())
    assert not (tree / "reports/compare.html").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["bold"], 2, "takes two or more runs (got 1)"),
        (["bold", "bold-ape"], 2, "bold-ape is there twice"),
        (["bold", "nobody"], 1, "run 'nobody': not found; available: bold-ape, calm-bee"),
        (["bold", "calm", "--out", "reports"], 1, "--out: reports is a folder; name a file"),
    ],
)
def test_wrong_comparisons_are_refused(tree: Path, arguments: list[str], status: int, words: str) -> None:
    done = ddpm(tree, "compare", *arguments, environment=ENVIRONMENT)
    assert done.returncode == status
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tree / "reports/compare.html").exists()
