"""Import a model into data/models, where a training can start from it, and track it with DVC."""

import re
import tempfile
from pathlib import Path

import torch

from diffusion.errors import UsageError, UserError
from diffusion.exchange import diffusers
from diffusion.model import CONFIG, FILES, WEIGHTS, load_model
from diffusion.storage.files import sha256, write_atomic
from flows import dvc_add, origin, start, workspace
from flows.origin import Origin
from flows.params import MODEL_NAME, load
from flows.paths import Paths
from flows.tracking import lineage


def import_model(given: str, name: str | None, paths: Paths, force: bool) -> None:
    """Copy a model to data/models/NAME and add it to DVC.

    Args:
        given: a flow run, by name or unique prefix; a version or alias of the registered model; or a folder with a
            model, as models/ddpm is one, or with one of diffusers.
        name: name below data/models; by default that of the run, version or folder.
        paths: paths of the working tree.
        force: whether to replace a model of this name.
    Raises:
        UserError: there is no such model, a file is damaged, the name is invalid or exists, or DVC fails; nothing is
            left behind.
    """
    if name is not None and not re.fullmatch(MODEL_NAME, name):
        raise UsageError(
            f"--name: must start with a letter or digit and contain only letters, digits, dots, - and _ (got {name!r})"
        )
    dvc_add.check_repository(paths)
    with tempfile.TemporaryDirectory() as temporary:
        folder, called, found = _find(given, paths, Path(temporary))
        model = load_model(folder, torch.device("cpu"))  # checks all files
        target = paths.imported / (name or re.sub(r"[^A-Za-z0-9._-]+", "-", called).lstrip(".-_") or "model")

        def make(copy: Path) -> None:
            for file in FILES:
                write_atomic(copy / file, (folder / file).read_bytes())
            if sha256(copy / WEIGHTS) != found.weights_sha256:
                raise UserError(f"{folder}: has changed while it was read; import it again")
            found.write(copy)

        again, replace = "replace it with --force", force and not target.is_file()
        dvc_add.add(target, paths, make, replace=replace, advice=again, description=f"the model of {found}")
    channels, height, width = model.shape
    size = sum(parameter.numel() for parameter in model.net.parameters())
    tracked, ignored = (file(target).relative_to(paths.root) for file in (dvc_add.dvc_file, dvc_add.ignore_file))
    print(
        f"{target} now holds the model of {found}: {size:,} parameters, {height}x{width}x{channels}, "
        f"sha256 {found.weights_sha256[:12]}\n\nTo train from it, and to keep its DVC file in git:\n\n"
        f"    ddpm set train.start_from={target.name}\n"
        f"    git add {tracked.as_posix()} {ignored.as_posix()}\n"
        "    prefect deployment run train-ddpm --watch      # or dvc repro"
    )
    if paths.params.exists() and (different := start.differences_of(model.config, load(paths.params))):
        print(f"\nFirst change what differs in {paths.params}. The model has {'; '.join(different)}.")


def _find(given: str, paths: Paths, temporary: Path) -> tuple[Path, str, Origin]:
    """The folder of the model, what to call it, and where it comes from."""
    if not given.isdecimal():
        if Path(given).is_dir():
            return _in_folder(given, paths, temporary)
        if any(each.name.startswith(given) for each, _ in workspace.all_runs()):
            return _of_run(workspace.find(given), paths)
        if len(Path(given).parts) > 1:
            raise UserError(f"{given}: no such folder")
    return lineage.download(load(paths.params), paths, given, temporary)


def _of_run(directory: Path, paths: Paths) -> tuple[Path, str, Origin]:
    name = directory.name
    if teacher := workspace.Run.read(directory).teacher:
        raise UserError(f"run {name!r}: is a distillation; import the model of its teacher, run {teacher!r}")
    model = Paths(directory).model
    if not (model / WEIGHTS).exists():
        raise UserError(f"run {name!r}: {model / WEIGHTS} is missing; import the model of a run that has trained one")
    return model, name, lineage.with_run(Origin(run=name, weights_sha256=sha256(model / WEIGHTS)), paths)


def _in_folder(given: str, paths: Paths, temporary: Path) -> tuple[Path, str, Origin]:
    folder, name = Path(given), Path(given).resolve().name
    if not (folder / WEIGHTS).exists():
        if not any((folder / file).exists() for file in (diffusers.PIPELINE, diffusers.UNET, diffusers.WEIGHTS)):
            raise UserError(f"{folder}: holds neither {CONFIG} and {WEIGHTS}, as models/ddpm, nor a model of diffusers")
        diffusers.import_model(folder, temporary / "model", force=False)
        folder = temporary / "model"
    elif (folder / origin.FILE).exists():
        return folder, name, Origin.read(folder)
    return folder, name, lineage.with_run(Origin(folder=given, weights_sha256=sha256(folder / WEIGHTS)), paths)
