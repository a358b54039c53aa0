"""Creating the deployment `train-ddpm` on the Prefect server."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.errors import UserError
from diffusion.storage.files import write_atomic
from flows import http
from flows.paths import Paths

if TYPE_CHECKING:
    from flows.services import Services

NAME = "train-ddpm"


def deploy(services: "Services") -> None:
    """Create or update the deployment unless it is current."""
    digest = hashlib.sha256()
    for file in deployed_files():
        digest.update(file.read_bytes())
    there = http.json(f"{services.prefect}/api/deployments/name/{NAME}/{NAME}")
    stamp = services.directory / "deployed"
    now = f"{digest.hexdigest()} {there and there['id']}"
    if there and stamp.exists() and stamp.read_text() == now:
        return
    paused = bool(there and there["paused"])
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = services.environment() | {"PWD": str(services.root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    there = http.json(f"{services.prefect}/api/deployments/name/{NAME}/{NAME}")
    if done.returncode or not there:
        raise UserError(f"prefect deploy failed:\n{done.stdout}{done.stderr}")
    if paused:  # `prefect deploy` resumes it
        http.json(f"{services.prefect}/api/deployments/{there['id']}/pause_deployment", {})
    write_atomic(stamp, f"{digest.hexdigest()} {there['id']}".encode())
    print(f"deployed {NAME}")


def deployed_files() -> list[Path]:
    """The files that determine the deployment, including the schema of its parameters."""
    code = [*Path("diffusion").rglob("*.py"), *Path("flows").glob("*.py")]
    files = [Path("prefect.yaml"), Paths().params, *code, *Paths().presets.glob("*.yaml")]
    return sorted(file for file in files if file.exists())
