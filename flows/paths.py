"""Every artefact's path, once."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """The files of one working tree (or of one run's workspace), below `root`."""

    root: Path = Path()

    # Inputs.
    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def presets(self) -> Path:
        return self.root / "presets"

    @property
    def raw(self) -> Path:
        return self.root / "data" / "raw"

    # shard
    @property
    def shards(self) -> Path:
        return self.root / "data" / "shards"

    # pairs
    @property
    def pairs(self) -> Path:
        return self.root / "data" / "pairs"

    # train
    @property
    def model(self) -> Path:
        return self.root / "models" / "ddpm"

    @property
    def train_report(self) -> Path:
        return self.root / "reports" / "train.json"

    @property
    def train_curves(self) -> Path:
        return self.root / "reports" / "train_curves"

    @property
    def previews(self) -> Path:
        return self.root / "reports" / "previews"

    # evaluate
    @property
    def evaluate_report(self) -> Path:
        return self.root / "reports" / "evaluate.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "reports" / "evaluation"

    @property
    def report(self) -> Path:
        return self.root / "reports" / "report.html"

    # export
    @property
    def onnx(self) -> Path:
        return self.root / "models" / "onnx"

    @property
    def denoiser(self) -> Path:
        return self.denoiser_in("fp32")

    @property
    def sampler(self) -> Path:
        return self.sampler_in("fp32")

    def denoiser_in(self, precision: str) -> Path:
        return self._graph("denoiser", precision)

    def sampler_in(self, precision: str) -> Path:
        return self._graph("sampler", precision)

    def _graph(self, name: str, precision: str) -> Path:
        return self.onnx / (f"{name}.onnx" if precision == "fp32" else f"{name}_{precision}.onnx")

    @property
    def export_report(self) -> Path:
        return self.root / "reports" / "export.json"

    def made_with(self, stage: str) -> Path:
        """The record of what a stage's outputs were made with."""
        return self.root / "reports" / "made_with" / f"{stage}.json"

    # Working state, outside git and outside DVC's outputs. A run's workspace links it to the repository's.
    @property
    def state(self) -> Path:
        return self.root / ".ddpm"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    @property
    def mlflow_database(self) -> Path:
        return self.state / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.state / "mlflow-artifacts"

    @property
    def runs(self) -> Path:
        return self.state / "runs"
