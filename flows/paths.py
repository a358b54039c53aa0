"""The paths of all files, defined in one place."""

from pathlib import Path

STUDENT_STAGES = {"train": "distill", "evaluate": "evaluate-student", "export": "export-student"}
"""The stages of distill/dvc.yaml, by those of dvc.yaml that do the same for the teacher."""


class Paths:
    """The files of a working tree or of a run's workspace, below `root`; with `student`, those of the distilled model.

    The student has a model, reports and ONNX files of its own, and shares everything else with its teacher.
    """

    def __init__(self, root: Path = Path(), student: bool = False) -> None:
        self.root, self.student = root, student
        data, models, shared = root / "data", root / "models", root / "reports"
        reports = shared / "student" if student else shared
        # Inputs.
        self.params = root / "params.yaml"
        self.presets = root / "presets"
        self.raw = data / "raw"
        self.imported = data / "models"
        self.licenses = data / "licenses.yaml"
        self.card_text = root / "model-card.md"
        # shard
        self.shards = data / "shards"
        self.data_report = shared / "data.html"
        self.rejected = shared / "rejected.csv"
        # pairs
        self.pairs = data / "pairs"
        # train, or distill
        self.teacher = models / "ddpm"
        self.model = models / "student" if student else self.teacher
        self.train_report = reports / "train.json"
        self.train_curves = reports / "train_curves"
        self.previews = reports / "previews"
        # evaluate, or evaluate-student
        self.evaluate_report = reports / "evaluate.json"
        self.evaluation = reports / "evaluation"
        self.report = reports / "report.html"
        # `ddpm report` and `ddpm compare`
        self.run_report = reports / "run.html"
        self.comparison = reports / "compare.html"
        # export, or export-student
        self.onnx = models / ("student-onnx" if student else "onnx")
        self.denoiser = self.denoiser_in("fp32")
        self.sampler = self.sampler_in("fp32")
        self.card = self.onnx / "README.md"
        self.export_report = reports / "export.json"
        # Working state, ignored by git and not a DVC output. A run's workspace links it to that of the repository.
        self.state = root / ".ddpm"
        self.checkpoints = self.state / "checkpoints"
        self.features = self.state / "features"
        self.mlflow_database = self.state / "mlflow.db"
        self.mlflow_artifacts = self.state / "mlflow-artifacts"
        self.runs = self.state / "runs"
        self.sweeps = self.state / "sweeps"

    def denoiser_in(self, precision: str) -> Path:
        return self._graph("denoiser", precision)

    def sampler_in(self, precision: str) -> Path:
        return self._graph("sampler", precision)

    def _graph(self, name: str, precision: str) -> Path:
        return self.onnx / (f"{name}.onnx" if precision == "fp32" else f"{name}_{precision}.onnx")

    def stage(self, stage: str) -> str:
        """The stage that does for this model what `stage` does for the teacher."""
        return STUDENT_STAGES.get(stage, stage) if self.student else stage

    def made_with(self, stage: str) -> Path:
        """The provenance record of a stage's outputs."""
        return self.root / "reports" / "made_with" / f"{self.stage(stage)}.json"
