"""Rules across sections."""

from pathlib import Path
from typing import Any

import pytest

from diffusion.errors import UserError
from flows import params as parameters
from flows import yaml_files

ROOT = Path(__file__).parents[2]
STUDENT = {"sampler": {"kind": "consistency", "gamma": 0.0}}


@pytest.mark.parametrize(
    ("changes", "place", "guidance"),
    [
        ({"sample": STUDENT | {"guidance": 2.0}}, "sample", "sample"),
        ({"sample": {"guidance": 2.0}, "export": STUDENT}, "export", "sample"),
        ({"evaluate": {"samplers": [{}, STUDENT | {"guidance": 2}]}}, "evaluate.samplers.1", "evaluate.samplers.1"),
    ],
)
def test_distilled_models_are_not_guided(changes: dict[str, Any], place: str, guidance: str) -> None:
    document = yaml_files.overlay(yaml_files.read_yaml(ROOT / "params.yaml"), {"network": {"classes": True}} | changes)
    with pytest.raises(UserError) as raised:
        parameters.validate(document, "params.yaml")
    assert str(raised.value) == (
        f"params.yaml: {place}.sampler is consistency, for distilled models, which have guidance built in; choose "
        f"another, or set {guidance}.guidance to 1.0"
    )
    document["sample"]["guidance"] = 1.0
    document["evaluate"]["samplers"] = []
    parameters.validate(document, "params.yaml")
