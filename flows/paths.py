"""The paths of all files, defined in one place."""

from pathlib import Path


class Paths:
    """The files of a working tree or of a run's workspace, below `root`."""

    def __init__(self, root: Path = Path()) -> None:
        self.root = root
        data, models, reports = root / "data", root / "models", root / "reports"
        # Inputs.
        self.params = root / "params.yaml"
        self.presets = root / "presets"
        self.raw = data / "raw"
        # shard
        self.shards = data / "shards"
        self.data_report = reports / "data.html"
        self.rejected = reports / "rejected.csv"
        # pairs
        self.pairs = data / "pairs"
        # train
        self.model = models / "ddpm"
        self.train_report = reports / "train.json"
        self.train_curves = reports / "train_curves"
        self.previews = reports / "previews"
        # evaluate
        self.evaluate_report = reports / "evaluate.json"
        self.evaluation = reports / "evaluation"
        self.report = reports / "report.html"
        # `ddpm report` and `ddpm compare`
        self.run_report = reports / "run.html"
        self.comparison = reports / "compare.html"
        # export
        self.onnx = models / "onnx"
        self.denoiser = self.denoiser_in("fp32")
        self.sampler = self.sampler_in("fp32")
        self.export_report = reports / "export.json"
        # Working state, ignored by git and not a DVC output. A run's workspace links it to that of the repository.
        self.state = root / ".ddpm"
        self.checkpoints = self.state / "checkpoints"
        self.features = self.state / "features"
        self.mlflow_database = self.state / "mlflow.db"
        self.mlflow_artifacts = self.state / "mlflow-artifacts"
        self.runs = self.state / "runs"

    def denoiser_in(self, precision: str) -> Path:
        return self._graph("denoiser", precision)

    def sampler_in(self, precision: str) -> Path:
        return self._graph("sampler", precision)

    def _graph(self, name: str, precision: str) -> Path:
        return self.onnx / (f"{name}.onnx" if precision == "fp32" else f"{name}_{precision}.onnx")

    def made_with(self, stage: str) -> Path:
        """The provenance record of a stage's outputs."""
        return self.root / "reports" / "made_with" / f"{stage}.json"
