"""The flow's parameters: partial sections, refused by field."""

from typing import Annotated, Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validation
from pydantic import TypeAdapter, ValidationError

from diffusion import params
from flows.parameters import Part, PartOf, given
from flows.train_ddpm import train_ddpm

SCHEMA = parameter_schema(train_ddpm.fn).model_dump_for_openapi()


def test_a_part_takes_any_fields_of_its_section() -> None:
    part = TypeAdapter(Annotated[Part, PartOf("train")]).validate_python({"steps": 5, "flip": None})
    assert given({"train": part, "seed": 0, "shard": None, "pairs": PartOf("pairs").model()}) == {
        "train": {"steps": 5},
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("value", "field"), [({"stepz": 5}, "stepz"), ({"steps": 0}, "steps"), ({"decay": "x"}, "decay")]
)
def test_a_part_refuses_what_its_section_refuses(value: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        PartOf("train").model.model_validate(value)


def test_every_field_is_in_the_form_with_its_description() -> None:
    for name, section in params.SECTIONS.items():
        form = SCHEMA["definitions"][section.__name__]
        assert SCHEMA["properties"][name]["$ref"] == f"#/definitions/{section.__name__}"
        assert form["description"] == section.__doc__
        assert "required" not in form
        for key, field in section.model_fields.items():
            assert form["properties"][key]["description"] == field.description
            assert "default" not in form["properties"][key]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": {"steps": "many"}}, "field 'train.steps'"),
        ({"train": {"steps": 0}}, "field 'train.steps'. Failure reason: 0 is less than the minimum of 1"),
        ({"train": {"stepz": 5}}, r"field 'train'. Failure reason: .*'stepz' was unexpected"),
        ({"preset": "none"}, "field 'preset'. Failure reason: 'none' is not one of "),
        ({"device": "tpu"}, "field 'device'"),
        ({"network": {"channel_multipliers": [0]}}, "field 'network.channel_multipliers"),
    ],
)
def test_the_server_refuses_a_wrong_value_naming_the_field(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(validation.ValidationError, match=message):
        validation.validate(wrong, SCHEMA, raise_on_error=True)


def test_the_server_takes_right_values() -> None:
    right = {"train": {"steps": 5, "decay": "linear"}, "seed": 3, "network": {"attention_levels": []}}
    assert validation.validate(right, SCHEMA) == []
    assert train_ddpm.validate_parameters(right)["train"].steps == 5
