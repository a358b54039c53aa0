"""Clones of the repository with small parameters, in which local faults are injected."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from hashlib import sha256
from pathlib import Path

from ruamel.yaml import YAML

from deploy.team.stack import Failed, output_of, run

ROOT = Path(__file__).parents[2]
TINY = (
    "process.num_timesteps=20 network.kind=uvit network.base_channels=8 network.depth=1 network.patch_size=4 "
    "pairs.draws=1 pairs.heldout_draws=1 train.steps=40 train.batch_size=32 train.warmup_steps=2 train.log_every=10 "
    "train.preview_every=20 evaluate.resamples=100 evaluate.quality_samples=0 evaluate.likelihood_images=8 "
    "evaluate.exact_likelihood_images=2 sample.steps=4 sample.count=4 export.steps=4 export.max_loss=9"
)
"""Changes to params.yaml with which all stages take half a minute."""
STAGES = ("shard", "pairs", "train", "evaluate", "export")
OUTPUTS = ("data/shards", "data/pairs", "models", "reports")
OWN = ("DDPM_", "DVC_", "MLFLOW_", "PREFECT_", "GIT_")
"""Prefixes of variables that are not passed on."""


class Clone:
    """A working tree in which commands run as a user types them."""

    def __init__(self, path: Path, settings: dict[str, str] | None = None) -> None:
        self.path = path
        given = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
        self.environment = given | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",  # nothing listens there
            **(settings or {}),
        }

    def copy(self, target: Path, without: Iterable[str] = (), settings: dict[str, str] | None = None) -> "Clone":
        """A copy without some files and folders, named by their paths."""
        left_out = {self.path / name for name in without}

        def ignored(folder: str, names: list[str]) -> list[str]:
            return [name for name in names if Path(folder) / name in left_out]

        shutil.copytree(self.path, target, symlinks=True, ignore=ignored)
        return type(self)(target, settings)

    def fresh(self, target: Path) -> "Clone":
        """A copy in which no stage has run, and DVC's cache is empty."""
        return self.copy(target, (".ddpm", ".dvc/cache", "dvc.lock", *self.outputs(*STAGES)))

    def before(self, stage: str, target: Path) -> "Clone":
        """A copy without git and DVC in which only the stages before `stage` have run."""
        later = self.outputs(*STAGES[STAGES.index(stage) :])
        return self.copy(target, (".ddpm", ".git", ".dvc", "dvc.lock", *later))

    def call(self, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            command,
            cwd=self.path,
            env=self.environment | settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def do(self, *command: str, **settings: str) -> str:
        """The output of a command; raises Failed if its status is not 0."""
        return run(command, cwd=self.path, env=self.environment | settings)

    def start(self, *command: str, log: Path, **settings: str) -> "subprocess.Popen[bytes]":
        """Start a command in a process group of its own, its output in a file."""
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                cwd=self.path,
                env=self.environment | settings,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def digests(self, *parts: str) -> dict[str, str]:
        """SHA-256 of every file below some folders, hidden ones too; of `parts`, by default all outputs."""
        found = [path for part in parts or OUTPUTS for path in _below(self.path / part)]
        return {str(path.relative_to(self.path)): sha256(path.read_bytes()).hexdigest() for path in sorted(found)}

    def outputs(self, *stages: str) -> list[str]:
        """The paths that some stages write, as dvc.yaml lists them."""
        listed = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
        return [path for stage in stages for kind in ("outs", "metrics") for path in listed[stage].get(kind, [])]


def _below(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]


def ddpm(*arguments: str) -> tuple[str, ...]:
    """The command `ddpm ...` with the code of the working tree."""
    return (sys.executable, "-m", "flows", *arguments)


REPRO = (sys.executable, "-m", "flows.repro")
"""`dvc repro`, as the flows and `make repro` call it."""


def prepared(folder: Path) -> Clone:
    """A clone in which all stages have run."""
    clone = Clone(folder / "clone", {"HOME": str(folder)})
    run(["git", "clone", "--quiet", f"file://{ROOT}", str(clone.path)])
    for name, value in (("user.name", "A user"), ("user.email", "user@example.org")):
        clone.do("git", "config", name, value)
    clone.do(*ddpm("set", *TINY.split()))
    clone.do("git", "commit", "--quiet", "--all", "--message", "A small model")
    clone.do(*REPRO)
    return clone


def must(what: str, holds: bool, done: "subprocess.CompletedProcess[str] | str" = "") -> None:
    """Raise Failed, with the end of a command's output, unless something holds."""
    if not holds:
        said = done if isinstance(done, str) else output_of(done)
        raise Failed(f"not so: {what}; the output ends with: {' / '.join(said.strip().splitlines()[-5:])}")


def same(what: str, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise Failed, naming some of the files that differ, unless digests are the same."""
    differ = sorted({path for path, _ in found.items() ^ wanted.items()})
    must(f"{what} have the same bytes; these do not: {', '.join(differ[:5])}", not differ)


def refused(done: "subprocess.CompletedProcess[str]", pattern: str) -> str:
    """The line with which a command refused; raises Failed unless it matches, and is no traceback."""
    lines = done.stderr.strip().splitlines() or [""]
    found: Callable[[str], re.Match[str] | None] = re.compile(pattern).search
    must("a command that cannot work ends with a status that is not 0", done.returncode != 0, done)
    must("it prints no traceback", "Traceback" not in output_of(done), done)
    must(f"its last line matches {pattern!r}", found(lines[-1]) is not None, done)
    return lines[-1]


def shown(places: Collection[str]) -> str:
    """Some names for a table."""
    return ", ".join(f"`{place}`" for place in sorted(places))
