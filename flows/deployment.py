"""Creating the deployments of the flows on the Prefect server."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.errors import UserError
from diffusion.storage.files import write_atomic
from flows import http
from flows.paths import Paths
from flows.stages import STAGES, STUDENT_STAGES

if TYPE_CHECKING:
    from flows.services import Services

FLOWS: dict[str, list[str]] = {"train-ddpm": list(STAGES), "distill-ddpm": list(STUDENT_STAGES), "sweep-ddpm": []}
"""The stages of each flow, none for one that runs others; its deployment has the same name."""


def deploy(services: "Services") -> None:
    """Create or update the deployments unless they are current."""
    digest = hashlib.sha256()
    for file in deployed_files():
        digest.update(file.read_bytes())
    before = _deployed(services)
    stamp = services.directory / "deployed"
    if len(before) == len(FLOWS) and stamp.exists() and stamp.read_text() == _stamp(digest.hexdigest(), before):
        return
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = services.environment() | {"PWD": str(services.root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    now = _deployed(services)
    if done.returncode or len(now) < len(FLOWS):
        raise UserError(f"prefect deploy failed:\n{done.stdout}{done.stderr}")
    for name, deployment in now.items():
        if before.get(name, {}).get("paused"):  # `prefect deploy` resumes it
            http.json(f"{services.prefect}/api/deployments/{deployment['id']}/pause_deployment", {})
    write_atomic(stamp, _stamp(digest.hexdigest(), now).encode())
    print(f"deployed {', '.join(now)}")


def _deployed(services: "Services") -> dict[str, Any]:
    """What the server says of our deployments, by name; those that it has."""
    found = {name: http.json(f"{services.prefect}/api/deployments/name/{name}/{name}") for name in FLOWS}
    return {name: deployment for name, deployment in found.items() if deployment}


def _stamp(digest: str, deployments: dict[str, Any]) -> str:
    return " ".join([digest, *(str(deployment["id"]) for deployment in deployments.values())])


def deployed_files() -> list[Path]:
    """The files that determine the deployments, including the schemas of their parameters."""
    code = [*Path("diffusion").rglob("*.py"), *Path("flows").glob("*.py"), *Path("flows/sweep").glob("*.py")]
    files = [Path("prefect.yaml"), Paths().params, *code, *Paths().presets.glob("*.yaml")]
    return sorted(file for file in files if file.exists())
