"""The flow's parameters: partial sections, as strict as params.yaml, and all faults at once."""

import json
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validation
from ruamel.yaml import YAML

from diffusion.errors import UserError
from flows import deployment, params, teacher, workspace
from flows.distill_ddpm import distill_ddpm
from flows.flow_run import parameters as parameters_of
from flows.parameters import NOTHING, given
from flows.train_ddpm import train_ddpm
from tests.flows.test_params import ROOT, VALUES, WRONG

SCHEMA = parameter_schema(train_ddpm.fn).model_dump_for_openapi()
DISTILLATION = parameter_schema(distill_ddpm.fn).model_dump_for_openapi()


def test_what_is_left_out_or_null_is_as_in_params_yaml() -> None:
    parameters = {"train": {"steps": 5, "flip": None}, "seed": 0, "shard": None, "pairs": NOTHING, "process": {}}
    sample = {"sampler": {"kind": "ddim", "eta": None}}
    expected = {"train": {"steps": 5}, "seed": 0, "process": {}, "sample": {"sampler": {"kind": "ddim"}}}
    assert given(parameters | {"sample": sample}) == expected


def test_prefect_leaves_the_values_as_they_are() -> None:
    """Taken for other types, or checked one at a time, they would differ from those in the file."""
    for flow in (train_ddpm, distill_ddpm):
        assert not flow.should_validate_parameters
    deployments = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]
    assert [each["name"] for each in deployments] == list(deployment.FLOWS)
    for each in deployments:
        assert each["enforce_parameter_schema"] is False


@pytest.mark.parametrize(("section", "field", "_", "text", "right"), [row for row in VALUES if row[3] is not None])
def test_a_value_means_the_same_as_in_the_file(section: str, field: str, _: str, text: str, right: Any) -> None:
    """In Prefect's form, its `-p`, and that of `python -m flows.train_ddpm`."""
    changes = given(parameters_of([f'{section}={{"{field}": {text}}}']))
    assert changes == {section: {field: json.loads(text)}}
    if right is WRONG:
        with pytest.raises(UserError, match=rf"^parameters of the run: {section}\.{field}[:.]"):
            workspace.document(None, changes)
    else:
        assert workspace.document(None, changes)[section][field] == right


def test_the_rules_of_the_gate_are_given_as_a_whole() -> None:
    gate = [{"kind": "not-worse", "figure": "kid", "by": 0.5}]
    assert workspace.document(None, given(parameters_of([f"tracking={json.dumps({'gate': gate})}"])))["tracking"] == {
        "experiment": "ddpm", "model_name": "ddpm", "gate": gate,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"tracking\.gate\.0\.figure: missing; tracking\.gate\.0\.by: missing"):
        workspace.document(None, given(parameters_of(['tracking={"gate": ["better"]}'])))


def test_a_plain_parameter_is_as_strict() -> None:
    for text in ("true", '"3"', "1_0", "1e3", "3.0", "-1"):
        with pytest.raises(UserError, match=r"^parameters of the run: seed: input should be"):
            workspace.document(None, parameters_of([f"seed={text}"]))
    assert workspace.document(None, parameters_of(["seed=3"]))["seed"] == 3


def test_all_faults_are_reported_at_once() -> None:
    wrong = {
        "trian": {},
        "seed": "3",
        "train": {"steps": -1, "stepz": 5, "batch_size": 7, "accumulate": 2},
        "sample": {"variance": "learned", "steps": 5000},
    }
    with pytest.raises(UserError) as caught:
        workspace.document("cifar10", given(wrong))
    assert sorted(str(caught.value).removeprefix("parameters of the run: ").split("; ")) == [
        "sample.steps (5000) exceeds process.num_timesteps (1000)",
        "sample.variance is learned, which needs process.learned_variance: true",
        "seed: input should be a valid integer (got '3')",
        "train.steps: input should be greater than or equal to 0 (got -1)",
        "train.stepz: no such parameter",
        "train: batch_size (7) must be a multiple of processes x accumulate (2)",
        "trian: no such parameter",
    ]


@pytest.mark.parametrize("preset", ["none", ""])
def test_an_unknown_preset_is_refused(preset: str) -> None:
    with pytest.raises(UserError, match=f"^preset '{preset}': not found in presets/; available: cifar10, digits"):
        workspace.document(preset, {})


def test_a_parameter_that_is_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="parameter 'train': given twice"):
        parameters_of(['train={"steps": 5}', 'train={"flip": true}'])


def test_every_field_is_in_the_form_with_its_description() -> None:
    networks = params.CHOICES[("network",)].options.values()
    sections = [*({**params.SECTIONS, "network": None}.items()), *(("network", network) for network in networks)]
    for name, section in sections:
        if section is None:
            continue
        title = section.__name__.removesuffix("Options")
        schema = DISTILLATION if name == "distill" else SCHEMA
        form = schema["definitions"][title]
        refs = [schema["properties"][name], *schema["properties"][name].get("anyOf", [])]
        assert f"#/definitions/{title}" in [ref.get("$ref") for ref in refs]
        assert form["description"] == section.__doc__
        assert "required" not in form
        for key, field in section.model_fields.items():
            shown = form["properties"][key]["description"]
            assert field.description is None or shown.startswith(" ".join(field.description.split()[:5]))
            assert "default" not in form["properties"][key]


@pytest.mark.parametrize(
    ("form", "field", "takes", "value"),
    [
        ("Train", "steps", "integer, at least 0", "1000"),
        ("Train", "decay", "constant | linear | cosine", "linear"),
        ("UNet", "channel_multipliers", "list of integers, each at least 1", "[1, 2]"),
        ("UViT", "depth", "integer, at least 1", None),  # params.yaml has a U-Net
        ("Process", "loss", "mse | l1 | huber", "mse"),
        ("Evaluate", "samplers", "list of fields of sample", "[]"),
        (
            "Tracking",
            "gate",
            "list of limit | better | not-worse",
            '[{"kind": "limit", "figure": "val_mse", "value": 0.5}, '
            '{"kind": "better", "figure": "val_mse", "by": 0.0}]',
        ),
    ],
)
def test_the_form_says_what_a_field_takes_and_its_present_value(
    form: str, field: str, takes: str, value: str | None
) -> None:
    now = f" In params.yaml at the last `make up`: {value}." if value else ""
    assert SCHEMA["definitions"][form]["properties"][field]["description"].endswith(f" Accepts: {takes}.{now}")


def test_the_form_says_so_of_choices_with_fields_and_of_plain_parameters() -> None:
    optimizer = SCHEMA["definitions"]["Train"]["properties"]["optimizer"]["description"]
    assert optimizer.endswith(
        " Accepts: adamw | muon | sgd. In params.yaml at the last `make up`: muon. "
        "With muon, learning_rate: number, above 0. In params.yaml at the last `make up`: 0.01. "
        "With sgd, momentum: number, at least 0 and below 1."
    )
    assert SCHEMA["properties"]["seed"]["description"] == (
        "Random seed of the whole pipeline. Accepts: integer, at least 0. In params.yaml at the last `make up`: 0."
    )


def test_the_form_of_a_distillation_has_what_its_teacher_does_not_fix() -> None:
    assert list(DISTILLATION["properties"]) == ["run", "device", *teacher.SECTIONS]
    assert DISTILLATION["properties"]["run"]["description"].startswith("Name of a completed run of train-ddpm")
    right = {
        "run": "bold-ape",
        "distill": {"steps": 5, "method": {"kind": "progressive"}},
        "sample": {"threshold": 0.9},
    }
    assert validation.validate(right, DISTILLATION) == []
    wrong = {"run": 5, "distill": {"steps": "5", "stepz": 5}, "sample": {"threshold": 2.0}}
    assert {tuple(error.path)[:1] for error in validation.validate(wrong, DISTILLATION)} == {
        ("run",),
        ("distill",),
        ("sample",),
    }


def test_no_field_has_a_switch_which_sends_false_unless_it_is_turned_on() -> None:
    assert "boolean" not in json.dumps([SCHEMA, DISTILLATION])
    train = SCHEMA["definitions"]["Train"]["properties"]
    assert [train[name]["enum"] for name in ("flip", "compile")] == [[True, False], [True, False, "auto"]]
    assert validation.validate({"train": {"flip": True, "compile": "auto"}}, SCHEMA) == []
    assert [tuple(error.path) for error in validation.validate({"train": {"flip": "yes"}}, SCHEMA)] == [
        ("train", "flip")
    ]


def test_the_form_marks_every_wrong_field() -> None:
    wrong = {"train": {"steps": -1, "decay": "x", "stepz": 1}, "preset": "none", "device": "tpu", "seed": "3"}
    wrong["tracking"] = {"gate": [{"kind": "better", "figure": "fid"}]}
    wrong["evaluate"] = {"samplers": [{"steps": 5}, {"count": 5}]}
    errors = validation.validate(wrong, SCHEMA)
    assert {tuple(error.path)[:2] for error in errors} == {
        ("tracking", "gate"),
        ("evaluate", "samplers"),
        ("train", "steps"),
        ("train", "decay"),
        ("train",),
        ("preset",),
        ("device",),
        ("seed",),
    }


def test_the_form_takes_right_values() -> None:
    right = {"train": {"steps": 5, "decay": "linear"}, "seed": 3, "network": {"attention_levels": []}}
    right["tracking"] = {"gate": [{"kind": "not-worse", "figure": "kid", "by": 0.5}]}
    right["evaluate"] = {"samplers": [{"sampler": "heun", "steps": 5}, {"sampler": {"kind": "ddim", "eta": 0.5}}]}
    assert validation.validate(right, SCHEMA) == []
