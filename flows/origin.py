"""Where an imported model comes from: `origin.json` beside it, in data/models/NAME."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion.errors import FileFault
from diffusion.storage.files import write_json

FILE = "origin.json"


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
        if self.version and self.run:
            return f"{self.version}, trained in run {self.run}"
        return self.version or (f"run {self.run}" if self.run else f"the folder {self.folder}")

    @classmethod
    def read(cls, model: Path) -> "Origin":
        """The origin of the model in a folder; raises FileFault if it is missing or damaged."""
        file = model / FILE
        try:
            found = cls(**json.loads(file.read_bytes()))
        except OSError as error:
            raise FileFault(file, f"{error.strerror}; import the model with `ddpm import-model`") from None
        except (ValueError, TypeError):
            raise FileFault(file, "damaged; import the model again, `ddpm import-model --force`") from None
        if not all(isinstance(value, str) for value in asdict(found).values()):
            raise FileFault(file, "damaged; import the model again, `ddpm import-model --force`")
        return found

    def write(self, model: Path) -> None:
        write_json(model / FILE, asdict(self))
