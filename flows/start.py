"""The model that a training starts from: data/models/NAME, as `train.start_from` names it."""

import json
from pathlib import Path
from typing import Any

import torch

from diffusion.errors import UserError, shortened
from diffusion.model import CONFIG, WEIGHTS, Config, Model, load_config, load_model
from flows.made_with import leaves
from flows.origin import Origin
from flows.params import Params
from flows.paths import Paths

FREE = ("network.dropout", "process.weighting", "process.loss")
"""Fields that may differ from those of the model: the network computes the same with others."""
MISSING = object()


def load(paths: Paths, name: str, config: Config) -> tuple[Model, Origin]:
    """The model called `name`, on the CPU, and where it comes from.

    Raises:
        UserError: it is missing or damaged, or its network or process is not that of `config`; names the fields.
    """
    directory = paths.imported / name
    _check_exists(directory)
    found = load_model(directory, torch.device("cpu"))
    _refuse(directory, differences(found.config, config))
    return found, Origin.read(directory)


def check(paths: Paths, params: Params) -> Origin | None:
    """The origin of the model that a training with `params` starts from, if any, before there are images.

    Raises:
        UserError: as `load`, but the weights are not read, and the names of the classes are not known.
    """
    if not params.train.start_from:
        return None
    directory = paths.imported / params.train.start_from
    _check_exists(directory)
    _refuse(directory, differences_of(load_config(directory), params))
    return Origin.read(directory)


def differences_of(theirs: Config, params: Params) -> list[str]:
    """`differences` to the model that `params` describe, but for the names of the classes, which are in the data."""
    shape = (params.pairs.channels, params.pairs.height, params.pairs.width)
    ours = {"shape": shape, "network": params.network, "process": params.process}
    return differences(theirs, theirs.model_copy(update=ours))


def _check_exists(directory: Path) -> None:
    if not all((directory / file).exists() for file in (CONFIG, WEIGHTS)):
        raise UserError(
            f"train.start_from: data/models/{directory.name} holds no model; `ddpm import-model` brings one, `dvc "
            f"checkout data/models/{directory.name}.dvc` one that DVC tracks"
        )


def _refuse(directory: Path, different: list[str]) -> None:
    if different:
        raise UserError(
            f"train.start_from: the model in data/models/{directory.name} has {'; '.join(different)}; set the same "
            "parameters, or start from another model"
        )


def differences(theirs: Config, ours: Config) -> list[str]:
    """What differs between two models so that one cannot have the weights of the other: the fields and both values."""
    there, here = _facts(theirs), _facts(ours)
    if theirs.network.classes and ours.network.classes:
        there["classes"], here["classes"] = list(theirs.classes), list(ours.classes)
    names = [name for name in there | here if there.get(name, MISSING) != here.get(name, MISSING)]
    if "network.kind" in names:  # which has other fields
        names = [name for name in names if not name.startswith("network.") or name == "network.kind"]
    return [f"{name} {_text(there, name)}, not {_text(here, name)}" for name in names]


def _facts(config: Config) -> dict[str, Any]:
    shape = dict(zip(("pairs.channels", "pairs.height", "pairs.width"), config.shape, strict=True))
    sections = config.model_dump(mode="json", include={"network", "process"})
    fields = {
        name: value for name, value in leaves(sections) if not any(f"{name}.".startswith(f"{free}.") for free in FREE)
    }
    return shape | fields


def _text(facts: dict[str, Any], name: str) -> str:
    if name not in facts:
        return "none"
    value = facts[name]
    return shortened(value) if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
