"""The commands of `ddpm`: their names, groups and functions; what a command needs is imported when it is called."""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter

from flows import presets
from flows.commands.types import Integer
from flows.paths import Paths
from flows.stages import STAGES, STUDENT_STAGES

STAGE, DISTILLATION, INPUTS, MODELS, RUNS = (
    Group.create_ordered(name)
    for name in ("Stages", "Stages of the distillation", "Parameters and data", "Models", "Results and runs")
)
app = App(
    name="ddpm",
    help="Train, evaluate and export denoising diffusion models.",
    version=partial(version, "ddpm-pipeline"),
    default_parameter=Parameter(negative=()),  # no --no-force beside --force
)
app.register_install_completion_command(help="Install tab completion for this shell and exit.")


def _stage(stage: str) -> None:
    from flows.commands.stage import run

    run(stage)


for _group, _stages in ((STAGE, STAGES), (DISTILLATION, STUDENT_STAGES)):
    for _position, (_name, _text) in enumerate(_stages.items()):
        app.command(partial(_stage, _name), name=_name, help=_text, group=_group, sort_key=_position)


def _lazily(name: str, function: str, text: str, group: Group, usage: str | None = None) -> None:
    app.command(f"flows.commands.{function}", name=name, help=text, group=group, usage=usage)


_lazily(
    "params",
    "parameters:show",
    "Show parameters: value, default, choices, limits and meaning.",
    INPUTS,
    "Usage: ddpm params [SECTION] [--update]",
)
_lazily("set", "parameters:assign", "Change parameters in params.yaml.", INPUTS, "Usage: ddpm set NAME=VALUE...")


NAMES = tuple(presets.names(Paths().presets))


@app.command(group=INPUTS)
def preset(name: Annotated[Literal[NAMES] if NAMES else str, Parameter(help="A file in presets/.")], /) -> None:  # type: ignore[valid-type]
    """Load a preset into params.yaml; seed, device and tracking are kept."""
    from flows.commands.parameters import apply_preset

    apply_preset(name)


@app.command(name="import", group=INPUTS)
def import_data(
    images: str,
    /,
    *,
    name: str,
    size: Integer | None = None,
    channels: Integer | None = None,
    resize: Literal["crop", "pad", "stretch"] | None = None,
    background: str | None = None,
    filter: Literal["nearest", "box", "bilinear", "bicubic", "lanczos"] | None = None,
    layout: Literal["auto", "channels-first", "channels-last"] = "auto",
    value_range: tuple[float, float] | None = None,
    license: str | None = None,
    source_url: str | None = None,
    link: bool = False,
    split_names_as_classes: bool = False,
) -> None:
    """Add your own images to data/raw and DVC, and set the parameters for training on them.

    Args:
        images: A folder, .zip or .tar of images, Parquet files, webdataset shards, an .npz or .npy file, or a folder of
            idx or CIFAR files; or a URL such as s3://bucket/pictures.zip; or several, such as train-{0000..0009}.tar.
        name: Name below data/raw.
        size: Side of the square images to train on; by default found by looking at some of them, at most 64.
        channels: 1, 3, or 4 to train on transparency, too; by default 1 or 3, or the channels of arrays.
        resize: Crop images of another aspect ratio, pad them, or stretch them; by default as in params.yaml.
        background: Colour behind transparent pixels and beside padded images; by default as in params.yaml.
        filter: Filter for resizing; by default as in params.yaml.
        layout: Order of the axes of arrays, if it is ambiguous.
        value_range: The values of black and white of arrays and of greyscale pictures with more than 8 bits, if not
            those of their type.
        license: SPDX identifier of the images' license, such as CC-BY-4.0, for the model cards; or LicenseRef- and a
            name of your own.
        source_url: Page that states the license, or the origin of the images; needs --license.
        link: Link to the files instead of copying them; what is at a URL stays there.
        split_names_as_classes: Confirm that classes, or folders inside classes, are named like a split (train, test).
    """
    from diffusion.sources.reading import Reading
    from flows import importing

    given = {"channels": channels, "resize": resize, "background": background, "filter": filter}
    importing.import_data(
        images,
        name,
        Paths(),
        link=link,
        reading=Reading(split_names_as_classes, layout, value_range or ()),
        size=size,
        pairs={field: value for field, value in given.items() if value is not None},
        license=importing.license_of(license, source_url),
    )


_lazily("sample", "sample:run", "Generate images with the trained model.", MODELS)
_lazily("verify-onnx", "verify_onnx:run", "Verify an exported ONNX file: digest, graph and embedded test.", MODELS)
_lazily("triton", "triton:run", "Write both ONNX graphs as a model repository of Triton Inference Server.", MODELS)
_lazily("export-diffusers", "diffusers:export_model", "Write the trained model as a diffusers pipeline.", MODELS)
_lazily("import-diffusers", "diffusers:import_model", "Import a diffusers model as the trained model.", MODELS)


@app.command(name="import-model", group=MODELS)
def import_model(model: str, /, *, name: str | None = None, force: bool = False) -> None:
    """Add a trained model to data/models and DVC, for a training to start from (train.start_from).

    Args:
        model: A flow run (see `ddpm runs`); a version or alias of the registered model in MLflow, such as 3 or
            champion; or a folder with config.json and model.safetensors, as models/ddpm is one, or of diffusers.
        name: Name below data/models; by default that of the run, version or folder.
        force: Replace a model of this name.
    """
    from flows import importing_models

    importing_models.import_model(model, name, Paths(), force)


@app.command(group=RUNS)
def runs() -> None:
    """List the flow runs and their states."""
    from flows import run_list

    run_list.show()


@app.command(group=RUNS, usage="Usage: ddpm summary [RUN]")
def summary(run: str | None = None, /) -> None:
    """Show a flow run's stages and results.

    Args:
        run: Name of a flow run; by default the last completed one.
    """
    from flows import summary

    summary.show(run)


@app.command(group=RUNS, usage="Usage: ddpm report [RUN]")
def report(run: str | None = None, /) -> None:
    """Write everything about a run's results on one page, and open it in a browser if there is one.

    Args:
        run: Name of a flow run (see `ddpm runs`); by default the working tree.
    """
    from flows import run_report

    run_report.show(run)


@app.command(group=RUNS, usage="Usage: ddpm compare RUN RUN... [--out FILE]")
def compare(*runs: str, out: Path | None = None) -> None:
    """Show several runs side by side: on one page, and their figures on the terminal.

    Args:
        runs: Names of two or more flow runs (see `ddpm runs`); . is the working tree. Figures are compared with those
            of the first.
        out: The page to write; by default reports/compare.html.
    """
    from flows.comparison import command

    command.show(runs, out)


@app.command(group=RUNS)
def fetch(run: str, /) -> None:
    """Fetch a training that ran on another machine, for apply, report and distill-ddpm.

    Args:
        run: Name of a completed flow run, as MLflow has it.
    """
    from flows.fetching import fetch

    fetch(run)


@app.command(group=RUNS)
def apply(run: str, /, *, force: bool = False) -> None:
    """Copy a flow run's parameters and results into the working tree.

    Args:
        run: Name of a flow run (see `ddpm runs`).
        force: Overwrite uncommitted changes.
    """
    from flows.apply import apply

    apply(run, force=force)


@app.command(group=RUNS, usage="Usage: ddpm track [RUN] [--student] [--json]")
def track(run: str | None = None, /, *, student: bool = False, json: bool = False) -> None:
    """Record missing results in MLflow.

    Args:
        run: Name of a flow run (see `ddpm runs`); by default the working tree.
        student: Record the distilled model; implied if RUN is a distillation.
        json: Print run id, address and model version as JSON.
    """
    from flows import tracking, workspace
    from flows.params import load

    root = Path() if run is None else workspace.find(run)
    paths = Paths(root, student or (run is not None and bool(workspace.Run.read(root).teacher)))
    tracking.track(load(paths.params), paths, as_json=json)


@app.command(group=RUNS, usage="Usage: ddpm gc [--keep N] [--older-than AGE] [--force] [--json]")
def gc(*, keep: Integer | None = None, older_than: str | None = None, force: bool = False, json: bool = False) -> None:
    """Show what takes up space and what can be deleted; with --force, delete it.

    Deleted: files in DVC's cache that nothing uses, runs that were deleted in MLflow, what killed commands left, and,
    by --keep and --older-than, runs and the checkpoints of interrupted trainings. Never deleted: active runs, those
    whose model is champion, challenger or has another alias in MLflow, their teachers, and what a git commit uses.

    Args:
        keep: Keep this many of the latest runs.
        older_than: Delete only what is older than this, such as 30d (h: hours, d: days, w: weeks).
        force: Delete; without it, nothing is deleted.
        json: Print bytes and names as JSON.
    """
    from flows.garbage import command

    command.run(keep, older_than, force=force, as_json=json)


@app.command(group=RUNS)
def promote(version: str, /, *, reason: str, student: bool = False) -> None:
    """Make a registered model version the champion.

    Args:
        version: Its number in MLflow.
        reason: Reason; appended to the version's description.
        student: The version is one of the distilled model.
    """
    from flows import tracking
    from flows.params import load

    paths = Paths(student=student)
    tracking.promote(load(paths.params), paths, version, reason)
