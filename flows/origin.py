"""Where an imported model comes from: `origin.json` beside it, in data/models/NAME."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion.errors import FileFault
from diffusion.model import WEIGHTS
from diffusion.storage.files import sha256, write_json

FILE = "origin.json"
AGAIN = "import the model again, `ddpm import-model --force`"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The content of origin.json; what is not known is empty."""

    run: str = ""
    """Name of the flow run, or of the MLflow run, that trained it."""
    run_id: str = ""
    """Id of the MLflow run that trained it."""
    version: str = ""
    """The version of the registered model, such as `ddpm version 3`."""
    folder: str = ""
    """The folder that it was imported from."""
    weights_sha256: str
    """SHA-256 of model.safetensors."""

    def __str__(self) -> str:
        run = f"run {self.run}" if self.run else ""
        if self.version:
            return f"{self.version}, trained in {run}" if run else self.version
        return run or (f"the folder {self.folder}" if self.folder else "a model of unknown origin")

    @classmethod
    def read(cls, model: Path) -> "Origin":
        """The origin of the model in a folder, which may have been put there without one; raises FileFault if a file
        is damaged, or describes other weights."""
        file, weights = model / FILE, sha256(model / WEIGHTS)
        try:
            found = cls(**json.loads(file.read_bytes())) if file.exists() else cls(weights_sha256=weights)
            if not all(isinstance(value, str) for value in asdict(found).values()):
                raise TypeError
        except (ValueError, TypeError):
            raise FileFault(file, f"damaged; {AGAIN}") from None
        if found.weights_sha256 != weights:
            raise FileFault(file, f"describes other weights than {WEIGHTS}; {AGAIN}")
        return found

    def write(self, model: Path) -> None:
        write_json(model / FILE, asdict(self))
