"""The command line: `ddpm COMMAND`, or `python -m flows COMMAND`."""

import argparse
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from diffusion.errors import AlreadyReported, Stopped, SystemFault, UserError, WriteFault
from diffusion.progress import say
from flows import presets, yaml_files
from flows.parent import launched, stop_with_parent
from flows.paths import Paths
from flows.remedies import told
from flows.stages import STAGES


def run_stage(arguments: argparse.Namespace) -> None:
    stop_with_parent()
    # Every tar file of a large data set stays open while it is read.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    from flows.params import load

    paths = Paths()
    params = load(paths.params)
    check_untracked(arguments.command)
    with stoppable():
        importlib.import_module(f"flows.stages.{arguments.command}").run(params, paths)


@contextmanager
def stoppable() -> Iterator[None]:
    """A block that SIGTERM ends by raising Stopped, so that it can clean up and mark its records as stopped."""
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:  # it ends anyway: while Python shuts down, `stop` would only leave a traceback
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def check_untracked(stage: str) -> None:
    """Raise UserError if git tracks an output of a stage: DVC refuses it too, but only after the stage has run."""
    pipeline = Path("dvc.yaml")
    described = yaml_files.read_yaml(pipeline).get("stages", {}).get(stage, {}) if pipeline.exists() else {}
    outputs = [*described.get("outs", []), *described.get("metrics", [])]
    tracked = [output for output in outputs if isinstance(output, str) and git_tracks(output)]  # else: cache: false
    if tracked:
        raise UserError(
            f"{', '.join(tracked)}: tracked by git, but written by the stage {stage} and kept by DVC; run "
            f"`git rm -r --cached {' '.join(tracked)}`, which deletes no file"
        )


def git_tracks(path: str) -> bool:
    """Whether git tracks a file, or one in a folder; false outside of a repository, and without git."""
    command = ["git", "--literal-pathspecs", "ls-files", "-z", "--", path]
    try:
        return bool(subprocess.run(command, capture_output=True, check=False).stdout)
    except FileNotFoundError:
        return False


def stop(signum: int, _: FrameType | None) -> NoReturn:
    """End as after an error, so that nothing half-made is left behind."""
    raise Stopped(signum)


def lazily(module: str, function: str) -> Callable[[argparse.Namespace], None]:
    """A function of flows.commands, given the arguments and the paths; what it needs is imported when it is called."""

    def call(arguments: argparse.Namespace) -> None:
        getattr(importlib.import_module(f"flows.commands.{module}"), function)(arguments, Paths())

    return call


def import_data(arguments: argparse.Namespace) -> None:
    from flows.importing import import_data

    with stoppable():
        import_data(
            arguments.path,
            arguments.name,
            Paths(),
            link=arguments.link,
            split_names_as_classes=arguments.split_names_as_classes,
        )


def export_diffusers(arguments: argparse.Namespace) -> None:
    from diffusion.exchange import diffusers
    from flows.params import load

    paths = Paths()
    sample = load(paths.params).sample
    told = diffusers.export_model(arguments.model or paths.model, arguments.directory, sample, arguments.force)
    print(f"{arguments.directory} is now what diffusers.{told}")


def import_diffusers(arguments: argparse.Namespace) -> None:
    from diffusion.exchange import diffusers

    paths = Paths()
    out = arguments.out or paths.model
    told = diffusers.import_model(arguments.directory, out, arguments.force)
    if arguments.out is None:  # what was said of the training of the model before
        paths.train_report.unlink(missing_ok=True)
        for former in (paths.train_curves, paths.previews):
            shutil.rmtree(former, ignore_errors=True)
    print(f"{out} now holds the model of {arguments.directory}; {told}")


def verify_onnx(arguments: argparse.Namespace) -> None:
    from flows.commands import verify_onnx

    verify_onnx.run(arguments.file, arguments.device)


def triton(arguments: argparse.Namespace) -> None:
    from flows.commands import triton

    triton.run(arguments.directory, Paths(), arguments.max_batch, arguments.force)
    print(f"{arguments.directory} is now what `tritonserver --model-repository` takes")


def track(arguments: argparse.Namespace) -> None:
    from flows import tracking, workspace
    from flows.params import load

    paths = Paths(workspace.find(arguments.run)) if arguments.run else Paths()
    with stoppable():
        tracking.track(load(paths.params), paths, as_json=arguments.json)


def promote(arguments: argparse.Namespace) -> None:
    from flows import tracking
    from flows.params import load

    paths = Paths()
    with stoppable():
        tracking.promote(load(paths.params), paths, arguments.version, arguments.reason)


def apply_run(arguments: argparse.Namespace) -> None:
    from flows import apply

    with stoppable():
        apply.apply(arguments.run, force=arguments.force)


def list_runs(_: argparse.Namespace) -> None:
    from flows import workspace

    workspace.list_runs()


def summary(arguments: argparse.Namespace) -> None:
    from flows import summary

    summary.show(arguments.run)


Command = Callable[[str, str, Callable[[argparse.Namespace], None]], argparse.ArgumentParser]
"""Adds a command by its name, what it does, and the function that does it."""


def parser(complete: bool = True) -> argparse.ArgumentParser:
    """The commands; without `complete`, which imports torch, `sample` has no options."""
    top = argparse.ArgumentParser(prog="ddpm", description="Train, evaluate and export denoising diffusion models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, action: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made.set_defaults(action=action)
        return made

    for name, text in STAGES.items():
        command(name, text, run_stage)
    _for_inputs(command)
    _for_models(command, complete)
    _for_runs(command)
    return top


def _for_inputs(command: Command) -> None:
    """Commands that change parameters and data."""
    shown = command("params", "explain every parameter", lazily("parameters", "show"))
    shown.add_argument(
        "--update",
        action="store_true",
        help="add what is missing in params.yaml, with its default, and migrate a file of an earlier version",
    )
    assigns = command("set", "change parameters in params.yaml", lazily("parameters", "assign"))
    assigns.add_argument(
        "changes",
        nargs="+",
        metavar="NAME=VALUE",
        help="train.steps=500, say; with another kind (network.kind=uvit) its fields take their defaults",
    )
    preset = command("preset", "write a preset into params.yaml", lazily("parameters", "apply_preset"))
    preset.add_argument("name", help=f"one of: {', '.join(presets.names(Paths().presets)) or 'presets/*.yaml'}")

    imports = command("import", "bring images under data/raw and DVC", import_data)
    imports.add_argument("path", type=Path, help="an .npz file, a folder of idx files or a folder of images")
    imports.add_argument("--name", required=True, help="name below data/raw")
    imports.add_argument("--link", action="store_true", help="link to the files instead of copying them")
    imports.add_argument(
        "--split-names-as-classes",
        action="store_true",
        help="confirm classes, and folders inside classes, that are named like a split (train, test, ...)",
    )


def _for_models(command: Command, complete: bool) -> None:
    """Commands that use and exchange models."""
    samples = command("sample", "make pictures with the trained model", lazily("sample", "run"))
    if complete:
        from flows.commands.sample import add_options

        add_options(samples)

    exports = command("export-diffusers", "write a trained model as a pipeline of diffusers", export_diffusers)
    exports.add_argument("directory", type=Path, metavar="DIR", help="what DDPMPipeline.from_pretrained will load")
    exports.add_argument("--model", type=Path, metavar="DIR", help="a trained model; without it, models/ddpm")
    exports.add_argument("--force", action="store_true", help="replace a pipeline that is there")

    adopts = command("import-diffusers", "make a model of diffusers the trained model", import_diffusers)
    adopts.add_argument("directory", type=Path, metavar="DIR", help="a DDPMPipeline, or a UNet2DModel")
    adopts.add_argument(
        "--out", type=Path, metavar="DIR", help="where it goes; without it, models/ddpm, as if trained here"
    )
    adopts.add_argument("--force", action="store_true", help="replace a model that is there")

    verifies = command("verify-onnx", "check an exported ONNX file by the test that it carries", verify_onnx)
    verifies.add_argument("file", type=Path, metavar="FILE", help="models/onnx/sampler.onnx, say")
    verifies.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N; others run on the CPU")

    serves = command("triton", "write both ONNX graphs as a model repository of Triton Inference Server", triton)
    serves.add_argument("directory", type=Path, metavar="DIR", help="the model repository")
    serves.add_argument(
        "--max-batch", type=yaml_files.integer, default=64, help="images that are computed at once (default 64)"
    )
    serves.add_argument("--force", action="store_true", help="replace a repository that is there")


def _for_runs(command: Command) -> None:
    """Commands about results and flow runs."""
    tracks = command("track", "bring the working tree's results, or a run's, into MLflow", track)
    tracks.add_argument("run", nargs="?", help="name of a flow run (see `ddpm runs`); without it, the working tree")
    tracks.add_argument("--json", action="store_true", help="print run id, address and model version as JSON")

    promotes = command("promote", "make a registered version the champion by hand", promote)
    promotes.add_argument("version", metavar="VERSION", help="its number in MLflow")
    promotes.add_argument("--reason", required=True, metavar="TEXT", help="why; goes into the version's description")

    applies = command("apply", "bring a flow run's parameters and results into the working tree", apply_run)
    applies.add_argument("run", help="name of a flow run (see `ddpm runs`)")
    applies.add_argument("--force", action="store_true", help="overwrite changes that are not committed")

    command("runs", "list the flow runs that are kept here", list_runs)
    shows = command("summary", "show a flow run's stages and results as a table", summary)
    shows.add_argument("run", nargs="?", help="name of a flow run; without it, the last one")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _main(argv)
    finally:  # what cannot be written is dropped: Python, ending, would try again and make the status 120
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _main(argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = parser(complete="sample" in given[:1]).parse_args(argv)
    try:
        arguments.action(arguments)
    except UserError as error:
        if not isinstance(error, AlreadyReported):
            goes_on = arguments.command == "train" and isinstance(error, WriteFault)
            more = "; training will then continue from its last checkpoint" if goes_on else ""
            say(f"ddpm {arguments.command}: error: {told(error)}{more}")
        return 1
    except Stopped as stopped:
        if not launched():
            print(f"ddpm {arguments.command}: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        if not launched():
            print(f"ddpm {arguments.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:
        say(f"ddpm {arguments.command}: error: {SystemFault.of(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
