"""The flow that distils a finished run, without a server, with instant stages; tests/e2e has real ones."""

import json
import os
import shutil
from contextlib import chdir
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from diffusion.errors import UserError
from diffusion.storage.files import write_json
from flows import distill_ddpm, dvc_lock, dvc_stage, params, pipeline, summary, teacher, workspace, yaml_files
from flows.__main__ import main
from flows.changes import lay_over
from tests.flows.conftest import git, new_repository, restore, save

pytestmark = pytest.mark.slow

RUNS = Path(".ddpm/runs")
DVC_YAML = """
stages:
  distill:
    wdir: ..
    cmd: python student.py models/student/result
    params: [distill]
    deps: [student.py, models/ddpm]
    outs: [models/student]
  evaluate-student:
    wdir: ..
    cmd: python student.py reports/student/evaluate.json
    deps: [student.py, models/student]
    metrics: [reports/student/evaluate.json]
  export-student:
    wdir: ..
    cmd: python student.py models/student-onnx/sampler.onnx
    deps: [student.py, models/student]
    outs: [models/student-onnx]
"""
STUDENT_PY = """
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
file.parent.mkdir(parents=True, exist_ok=True)
teacher = pathlib.Path("models/ddpm/result").read_text()
figures = json.dumps({"sampling_steps": 2, "drift": 1.5, "quality": "good"})
file.write_text(figures if file.suffix == ".json" else f"student of {teacher}")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A repository with a finished run `teach` of 5 steps, whose params.yaml has changed since."""
    directory = tmp_path_factory.mktemp("distill") / "a földer"
    new_repository(directory, root)
    with chdir(directory):
        Path("distill").mkdir()
        Path("distill/dvc.yaml").write_text(DVC_YAML)
        Path("student.py").write_text(STUDENT_PY)
        git("add", "--all")
        git("commit", "--quiet", "--message", "distillation")
        train("teach", {"train": {"steps": 5}, "distill": {"steps": 11}})
        change({"train": {"steps": 6}, "distill": {"steps": 7}})
    save(directory)
    return directory


@pytest.fixture
def trained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is restored and the working directory."""
    restore(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(pipeline, "_track", lambda *_: None)


def train(name: str, changes: dict[str, Any]) -> Path:
    with workspace.use(name, f"id-{name}", workspace.document(None, changes)) as directory:
        for stage in ("shard", "train"):
            dvc_stage.run(stage, directory, print)
    return directory


def change(changes: dict[str, Any]) -> None:
    path = Path("params.yaml")
    yaml_files.write_yaml(path, lay_over(yaml_files.read_yaml(path), changes))


@pytest.mark.usefixtures("trained")
def test_a_run_is_distilled_in_a_workspace_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tracked: list[bool] = []
    monkeypatch.setattr(pipeline, "_track", lambda _directory, student, *_: tracked.append(student))
    assert distill_ddpm.main(["--name", "stu", "-p", 'distill={"batch_size": 9}', "-p", "device=cpu"]) == 0
    directory = RUNS / "stu"
    assert "steps: 5" in (directory / "models/student/result").read_text()
    ran = params.load(directory / "params.yaml")
    assert (ran.train.steps, ran.distill.steps, ran.distill.batch_size, ran.device) == (5, 7, 9, "cpu")
    run = workspace.Run.read(directory)
    assert (run.state, run.teacher, run.git_dirty) == ("completed", "teach", True)
    assert tracked == [True]
    output = capfd.readouterr().out
    for stage in ("distill", "evaluate-student", "export-student"):
        assert f"Running stage 'distill/dvc.yaml:{stage}'" in output
    assert "'shard'" not in output
    assert "'train'" not in output
    _, _, table = output.partition("\nrun stu, a distillation of teach\n")
    rows = [line.split() for line in table.splitlines()]
    for row in (["steps", "2"], ["drift", "1.5000"], ["samples", "good"]):
        assert row in rows
    assert "`ddpm track stu`" in table
    assert summary.read(directory).onnx == str(directory.absolute() / "models/student-onnx/sampler.onnx")

    change({"distill": {"batch_size": 9}})
    assert distill_ddpm.main(["--name", "again", "-p", "run=te", "-p", "device=cpu"]) == 0
    assert {stage.outcome for stage in summary.read(RUNS / "again").stages} == {"cached"}


@pytest.mark.usefixtures("trained")
def test_the_teachers_results_are_linked_and_stay_as_they_are() -> None:
    assert distill_ddpm.main(["--name", "stu"]) == 0
    for name in ("data/shards/result", "models/ddpm/result"):
        assert (RUNS / "stu" / name).samefile(RUNS / "teach" / name)
    assert (RUNS / "stu/dvc.lock").read_bytes() == (RUNS / "teach/dvc.lock").read_bytes()
    assert not (RUNS / "stu/dvc.lock").samefile(RUNS / "teach/dvc.lock")
    assert not (RUNS / "teach/distill/dvc.lock").exists()
    shutil.rmtree(RUNS / "teach")
    assert "steps: 5" in (RUNS / "stu/models/ddpm/result").read_text()


@pytest.mark.usefixtures("trained")
def test_results_are_copied_where_they_cannot_be_linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    dvc_lock.link_teacher(RUNS / "teach", tmp_path / "copy")
    for name in ("dvc.lock", "models/ddpm/result"):
        assert (tmp_path / "copy" / name).read_bytes() == (RUNS / "teach" / name).read_bytes()


@pytest.mark.usefixtures("trained")
def test_by_default_the_training_that_ended_last_is_distilled(capsys: pytest.CaptureFixture[str]) -> None:
    for name, changes in (("later", {}), ("crashed", {"state": "crashed"}), ("stu", {"teacher": "teach"})):
        shutil.copytree(RUNS / "teach", RUNS / name, symlinks=True)
        made = replace(workspace.Run.read(RUNS / name), name=name, ended=datetime.now(UTC).isoformat())
        replace(made, **changes).write(RUNS / name)
    assert teacher.find(None).name == "later"
    for directory in RUNS.glob("[!.]*"):
        shutil.rmtree(directory)
    assert distill_ddpm.main([]) == 1
    assert capsys.readouterr().err == (
        "distill-ddpm: error: run: no run of train-ddpm has completed here yet; "
        "`prefect deployment run train-ddpm` starts one\n"
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"state": "failed"}, "run 'teach': failed; only the model of a completed run can be distilled"),
        ({"state": "running"}, "run 'teach': crashed; only the model"),
        ({"teacher": "first"}, "run 'teach': is a distillation; distil its teacher again, run 'first'"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_other_runs_are_refused_in_one_line(
    broken: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(workspace.Run.read(RUNS / "teach"), **broken).write(RUNS / "teach")
    assert distill_ddpm.main(["--run", "teach", "--name", "stu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"distill-ddpm: error: {message}")
    assert error.count("\n") == 1
    assert not (RUNS / "stu").exists()


@pytest.mark.parametrize(
    ("missing", "named"), [("models/ddpm", "models/ddpm"), ("data/shards", "data/shards"), ("dvc.lock", "models/ddpm")]
)
@pytest.mark.usefixtures("trained")
def test_a_run_without_its_results_is_refused(missing: str, named: str) -> None:
    shutil.rmtree(RUNS / "teach/models")
    path = RUNS / "teach" / missing
    if missing != "models/ddpm":
        (RUNS / "teach/models/ddpm").mkdir(parents=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if missing == "dvc.lock":
            shutil.rmtree(RUNS / "teach/models")
    with pytest.raises(UserError, match=f"run 'teach': {named} is missing from its workspace; run train-ddpm again"):
        teacher.find("teach")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "gone"], "run 'gone': not found; available: teach"),
        (["--run", ""], "run: must be the name of a run, as text (got '')"),
        (["-p", "run=5"], "run: must be the name of a run, as text (got 5)"),
        (["--run", "teach", "-p", "run=teach"], "run: given by --run and by -p; give it once"),
        (["-p", "train={}", "-p", "seed=1"], "train: is that of the run; a distillation takes run, device, distill,"),
        (["-p", "seed=1"], "seed: is that of the run; a distillation takes"),
        (["-p", "dsitill={}"], "dsitill: no such parameter; a distillation takes run, device, distill,"),
        (["-p", 'distill={"stepz": 1}'], "parameters of the run: distill.stepz: no such parameter"),
        (["-p", 'distill={"steps": "1"}'], "parameters of the run: distill.steps: input should be a valid integer"),
        (
            ["-p", 'distill={"sampling_steps": 5000}'],
            "parameters of the run: distill.sampling_steps: input should be",
        ),
    ],
)
@pytest.mark.usefixtures("trained")
def test_wrong_parameters_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill_ddpm.main([*arguments, "--name", "stu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"distill-ddpm: error: {message}")
    assert error.count("\n") == 1
    assert not (RUNS / "stu").exists()


@pytest.mark.usefixtures("trained")
def test_a_run_of_an_earlier_version_without_a_section_distill_can_be_distilled() -> None:
    path = RUNS / "teach/params.yaml"
    document = yaml_files.read_yaml(path)
    del document["distill"]
    yaml_files.write_yaml(path, document)
    run = json.loads((RUNS / "teach/run.json").read_text())
    del run["teacher"]
    write_json(RUNS / "teach/run.json", run)
    merged = teacher.document(teacher.find("teach"), {})
    assert (merged["train"]["steps"], merged["distill"]["steps"]) == (5, 7)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("parameterization", ["eps", "mu"])
def test_models_that_cannot_see_the_image_in_noise_are_refused(
    parameterization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RUNS / "teach/params.yaml"
    yaml_files.write_yaml(
        path, lay_over(yaml_files.read_yaml(path), {"process": {"parameterization": parameterization}})
    )
    assert distill_ddpm.main(["--name", "stu"]) == 1
    assert capsys.readouterr().err == (
        f"distill-ddpm: error: run 'teach': its model predicts {parameterization} (process.parameterization), which "
        "says little about the image where sampling starts; distil one trained to predict v or x_0\n"
    )
    assert not (RUNS / "stu").exists()


@pytest.mark.usefixtures("trained")
def test_the_teacher_is_not_cleaned_up_while_it_is_distilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_KEEP_RUNS", "0")
    assert distill_ddpm.main(["--name", "stu"]) == 0
    assert (RUNS / "teach").exists()
    train("next", {})
    assert {path.name for path in RUNS.glob("[!.]*")} == {"next"}


@pytest.mark.usefixtures("trained")
def test_commands_tell_distillations_from_trainings(capsys: pytest.CaptureFixture[str]) -> None:
    assert distill_ddpm.main(["--name", "stu"]) == 0
    for directory in ("teach", "stu"):
        write_json(RUNS / directory / "reports/evaluate.json", {"mse": 0.25})
    capsys.readouterr()
    assert main(["runs"]) == 0
    rows = {line.split()[0]: line.split()[3:] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()}
    assert rows == {
        "RUN": ["STATE", "MSE", "DISTILS", "STARTS", "FROM"],
        "teach": ["completed", "0.2500"],
        "stu": ["completed", "teach"],
    }
    assert main(["report", "stu"]) == 0
    assert capsys.readouterr().out == f"{RUNS}/stu/reports/student/report.html\n"
    assert main(["compare", "teach", "stu"]) == 1
    assert capsys.readouterr().err == (
        "ddpm compare: error: run 'stu': a distillation of 'teach'; `ddpm report stu` compares both, and "
        "`ddpm compare` takes trainings only\n"
    )
    (RUNS / "stu/reports/student/evaluate.json").unlink()
    assert main(["report", "stu"]) == 1
    assert "run 'stu': it has no evaluation to show; its state is completed" in capsys.readouterr().err


@pytest.mark.usefixtures("trained")
def test_applying_a_distillation_brings_the_teacher_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert distill_ddpm.main(["--name", "stu"]) == 0
    assert main(["apply", "stu"]) == 1
    assert "params.yaml: uncommitted changes would be lost" in capsys.readouterr().err
    assert main(["apply", "stu", "--force"]) == 0
    done = capsys.readouterr()
    assert (
        "params.yaml, dvc.lock, distill/dvc.lock, .dvcignore and the outputs of shard, train, distill, evaluate"
        in done.out
    )
    assert done.err == ""
    for name in ("models/ddpm", "models/student", "reports/student/evaluate.json", "models/student-onnx"):
        assert Path(name).exists()
    assert "Data and pipelines are up to date." in workspace.dvc(Path(), "repro", "distill/dvc.yaml")
    assert main(["apply", "teach", "--force"]) == 0
    assert "distill" not in capsys.readouterr().out
