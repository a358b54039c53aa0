"""Parameters, presets and the commands that show them."""

from pathlib import Path
from typing import Any

import pytest

from diffusion.errors import UserError
from flows import params as parameters
from flows import presets, yaml_files
from flows.__main__ import main
from flows.params import Params
from flows.rules import laid_over

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "presets"
WRONG = object()
VALUES: list[tuple[str, str, str, str | None, Any]] = [
    # section, field, in YAML, in JSON (None where JSON has no such spelling), value
    ("train", "steps", "10", "10", 10),
    ("train", "steps", "+10", None, 10),
    ("train", "steps", "&anchor 10", None, 10),
    ("train", "steps", "true", "true", WRONG),
    ("train", "steps", "&anchor true", None, WRONG),
    ("train", "steps", "'10'", '"10"', WRONG),
    ("train", "steps", "10.0", "10.0", WRONG),
    ("train", "steps", "1e3", "1e3", WRONG),
    ("train", "steps", "1_0", None, WRONG),
    ("train", "steps", "010", None, WRONG),  # 8 in YAML 1.1, 10 in YAML 1.2
    ("train", "steps", "0o10", None, WRONG),
    ("train", "steps", "0x10", None, WRONG),
    ("train", "steps", "0b10", None, WRONG),
    ("train", "steps", "1:30", None, WRONG),  # 90 in YAML 1.1
    ("train", "steps", "!!int 1_0", None, WRONG),
    ("train", "steps", "[10]", "[10]", WRONG),
    ("train", "steps", "{a: 1}", '{"a": 1}', WRONG),
    ("train", "learning_rate", "0.01", "0.01", 0.01),
    ("train", "learning_rate", "1e-2", "1e-2", 0.01),
    ("train", "learning_rate", ".01", None, 0.01),
    ("train", "learning_rate", "1", "1", 1.0),
    ("train", "learning_rate", "true", "true", WRONG),
    ("train", "learning_rate", "'0.01'", '"0.01"', WRONG),
    ("train", "learning_rate", "1_0.5", None, WRONG),
    ("train", "learning_rate", "0.0_1", None, WRONG),
    ("train", "learning_rate", "1:30.5", None, WRONG),
    ("train", "learning_rate", ".inf", "Infinity", WRONG),
    ("train", "learning_rate", ".nan", "NaN", WRONG),
    ("train", "flip", "true", "true", True),
    ("train", "flip", "False", "false", False),
    ("train", "flip", "&anchor true", None, True),
    ("train", "flip", "1", "1", WRONG),
    ("train", "flip", "0.0", "0.0", WRONG),
    ("train", "flip", "yes", '"yes"', WRONG),
    ("train", "flip", "off", '"off"', WRONG),
    ("train", "flip", "'true'", '"true"', WRONG),
    ("train", "augment", "auto", '"auto"', "auto"),
    ("train", "augment", "0.3", "0.3", 0.3),
    ("train", "augment", "0", "0", 0.0),
    ("train", "augment", "1", "1", WRONG),
    ("train", "augment", "-0.1", "-0.1", WRONG),
    ("train", "augment", "true", "true", WRONG),
    ("train", "augment", ".nan", "NaN", WRONG),
    ("train", "augment", "on", '"on"', WRONG),
    ("train", "compile", "auto", '"auto"', "auto"),
    ("train", "compile", "false", "false", False),
    ("train", "compile", "0", "0", WRONG),
    ("train", "compile", "no", '"no"', WRONG),
    ("train", "decay", "linear", '"linear"', "linear"),
    ("train", "decay", "Linear", '"Linear"', WRONG),
    ("train", "decay", "1", "1", WRONG),
    ("pairs", "channels", "3", "3", 3),
    ("pairs", "channels", "true", "true", WRONG),
    ("pairs", "channels", "1.0", "1.0", WRONG),
    ("pairs", "channels", "'1'", '"1"', WRONG),
    ("pairs", "channels", "0", "0", WRONG),
    ("shard", "value_range", "[9, 0]", "[9, 0]", WRONG),
    ("shard", "value_range", "[1]", "[1]", WRONG),
    ("network", "channel_multipliers", "[1, 2]", "[1, 2]", [1, 2]),
    ("network", "channel_multipliers", "[1, true]", "[1, true]", WRONG),
    ("network", "channel_multipliers", "[1, '2']", '[1, "2"]', WRONG),
    ("network", "channel_multipliers", "[1.0, 2]", "[1.0, 2]", WRONG),
    ("network", "channel_multipliers", "2", "2", WRONG),
    ("network", "channel_multipliers", "'1, 2'", '"1, 2"', WRONG),
    ("network", "channel_multipliers", "!!set {1, 2}", None, WRONG),
    ("shard", "source", "data/raw/a.npz", '"data/raw/a.npz"', "data/raw/a.npz"),
    ("tracking", "model_name", "a b-c_1.0", '"a b-c_1.0"', "a b-c_1.0"),
    ("tracking", "model_name", '"a/b"', '"a/b"', WRONG),
    ("tracking", "model_name", '"a:b"', '"a:b"', WRONG),
    ("tracking", "model_name", '"a\'b"', '"a\'b"', WRONG),
    ("tracking", "model_name", "'a\\'", '"a\\\\"', WRONG),
    ("tracking", "model_name", '" "', '" "', WRONG),
    ("evaluate", "samplers", "[{steps: 5}]", '[{"steps": 5}]', [{"steps": 5}]),
    ("evaluate", "samplers", "[{steps: '5'}]", '[{"steps": "5"}]', WRONG),
    ("evaluate", "samplers", "[{sampler: euler}]", '[{"sampler": "euler"}]', WRONG),
    ("evaluate", "samplers", "[{count: 5}]", '[{"count": 5}]', WRONG),
    ("evaluate", "samplers", "[heun]", '["heun"]', WRONG),
    ("tracking", "gate", "[]", "[]", []),
    ("tracking", "gate", "[{kind: best, figure: kid}]", '[{"kind": "best", "figure": "kid"}]', WRONG),
    ("tracking", "gate", "better", '"better"', WRONG),
    ("shard", "source", "5", "5", WRONG),
    ("shard", "source", "true", "true", WRONG),
    ("shard", "source", "2001-01-01", None, WRONG),
]
"""What is right in params.yaml, and elsewhere; listed by hand."""


@pytest.mark.parametrize("name", presets.names(PRESETS))
def test_a_preset_holds_what_differs_from_the_defaults_alone(name: str) -> None:
    defaults, content = Params().model_dump(mode="json"), yaml_files.read_yaml(PRESETS / f"{name}.yaml")
    assert isinstance(presets.load(PRESETS / f"{name}.yaml"), Params)
    assert not set(content) & set(presets.NOT_IN_PRESETS)
    for section, values in content.items():
        assert all(value != defaults[section][key] for key, value in values.items() if key != "source")


def test_snr_is_read_as_another_name_of_simple(params: Params) -> None:
    document = params.model_dump(mode="json")
    document["process"]["weighting"] = "snr"
    assert parameters.validate(document, "test").process.weighting.kind == "simple"


def test_a_preset_keeps_the_users_own_settings(tmp_path: Path) -> None:
    document = yaml_files.read_yaml(ROOT / "params.yaml")
    own: dict[str, Any] = {"seed": 5, "device": "cpu", "tracking": {"model_name": "mine"}}
    yaml_files.overlay(document, own | {"shard": {"source": "data/raw/mine"}, "train": {"steps": 7}})
    (tmp_path / "small.yaml").write_text("network:\n  base_channels: 16\n", encoding="utf-8")
    made = parameters.validate(presets.laid_over(document, tmp_path, "small"), "test")
    assert (made.seed, made.device, made.tracking.model_name) == (5, "cpu", "mine")
    assert made.shard.source == "data/raw/mine"
    assert made.network.base_channels == 16
    assert made.train.steps == presets.load(PRESETS / "digits.yaml").train.steps
    (tmp_path / "wrong.yaml").write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"wrong.yaml: seed: presets cannot set this; set it in params.yaml$"):
        presets.laid_over(document, tmp_path, "wrong")
    back = parameters.validate(presets.laid_over(document, PRESETS, "digits"), "test")
    assert back.shard.source == presets.load(PRESETS / "digits.yaml").shard.source


def test_params_yaml_holds_the_preset_of_the_digits(params: Params) -> None:
    assert params == presets.load(PRESETS / "digits.yaml")
    network = Params().network.model_copy(update={"fourier_features": (3, 4)})
    assert params == Params().model_copy(update={"network": network})


def test_every_field_is_described_and_read_somewhere() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("diffusion", "flows")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "params.py"
    )
    kinds = [kind for choice in parameters.CHOICES.values() for kind in choice.options.values()]
    for section in (*parameters.SECTIONS.values(), *kinds):
        for name, field in section.model_fields.items():
            assert field.description, name
            assert f".{name}" in code, name


def test_a_preset_is_written_and_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (ROOT / "params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(before, encoding="utf-8")
    Path("presets").symlink_to(PRESETS)
    assert main(["preset", "cifar10"]) == 0
    assert parameters.load(Path("params.yaml")) == presets.load(PRESETS / "cifar10.yaml")
    assert "# a GPU if available" in Path("params.yaml").read_text(encoding="utf-8")
    assert main(["preset", "digits"]) == 0
    assert parameters.load(Path("params.yaml")) == presets.load(PRESETS / "digits.yaml")
    assert main(["preset", "cifar"]) == 2
    assert capsys.readouterr().err == (
        'ddpm preset: error: Invalid value "cifar" for NAME. Choose from: "cifar10", "digits", "emoji", '
        '"fashion-mnist", "ho-2020". Did you mean "cifar10"? See `ddpm preset --help`.\n'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "not valid YAML"),
        ("seed: " + 1000 * "[", "nested too deeply"),
        ("- 1\n", "expected sections with fields, found a list"),
        ("5\n", "expected sections with fields, found 5"),
        ("", "expected sections with fields, found nothing"),
        ("seed: 1\n", "device: missing; "),
    ],
)
def test_a_broken_file_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parameters.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_gets_one_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(UserError, match="no such file here; run this in the pipeline's folder"):
        parameters.load(path)
    path.write_bytes(b"seed: \xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 6\); save it as UTF-8"):
        parameters.load(path)


@pytest.mark.parametrize(("section", "field", "text", "_", "right"), VALUES)
def test_types_are_strict(tmp_path: Path, section: str, field: str, text: str, _: str, right: Any) -> None:
    path = tmp_path / "params.yaml"
    document = yaml_files.overlay(yaml_files.read_yaml(ROOT / "params.yaml"), {section: {field: "PLACE"}})
    yaml_files.write_yaml(path, document)
    path.write_text(path.read_text(encoding="utf-8").replace("PLACE", text), encoding="utf-8")
    if right is WRONG:
        with pytest.raises(UserError, match=rf"{section}\.{field}[:.]|: tags ") as caught:
            parameters.load(path)
        assert str(caught.value).count(f"{section}.{field}") == (": tags " not in str(caught.value))
    else:
        value = getattr(getattr(parameters.load(path), section), field)
        expected = tuple(right) if isinstance(right, list) else right
        assert (type(value), value) == (type(expected), expected)


def test_all_faults_are_reported_at_once() -> None:
    """Fields, rules within a section and rules across sections, but no rule on a field that is wrong itself."""
    document = yaml_files.overlay(
        yaml_files.read_yaml(ROOT / "params.yaml"),
        {
            "process": {
                "weightin": [0.5],
                "zero_terminal_snr": True,
                "num_timesteps": "many",
                "parameterization": "eps",
            },
            "network": {"base_channels": 12, "attention_levels": [7], "patch_size": 9, "dropout": 2},
            "train": {"timesteps": "log-snr-normal"},
            "sample": {"steps": 5000},
        },
    )
    del document["seed"]
    with pytest.raises(UserError) as caught:
        parameters.validate(document, "here")
    found = str(caught.value).removeprefix("here: ").split("; ")
    assert sorted(fault[:44] for fault in found) == [
        "`ddpm params --update` adds what is missing",
        "network.base_channels: input should be a mul",
        "network.dropout: input should be less than 1",
        "network.patch_size (9) exceeds the images' s",
        "network: attention_levels contains 7, but th",
        "process.num_timesteps: input should be a val",
        "process.weightin: no such parameter",
        "process: zero_terminal_snr needs a parameter",
        "process: zero_terminal_snr needs a weighting",
        "seed: missing",
        "train.timesteps: log-snr-normal never draws ",
    ]


def test_overlay_merges_mappings_and_replaces_the_rest() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert yaml_files.overlay(base, {"a": {"c": [9]}, "d": 4}) == {"a": {"b": 1, "c": [9]}, "d": 4}


def test_what_is_missing_is_added_on_request(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    document = yaml_files.read_yaml(ROOT / "params.yaml")
    document["seed"] = 7
    del document["train"]["steps"], document["device"], document["evaluate"]
    yaml_files.write_yaml(tmp_path / "params.yaml", document)
    with pytest.raises(UserError, match=r"device: missing; evaluate: missing; train.steps: missing; `ddpm"):
        parameters.load(tmp_path / "params.yaml")
    assert main(["params", "--update"]) == 0
    shown = capsys.readouterr().out
    assert "train.steps: 1000\n" in shown
    assert "seed" not in shown
    assert parameters.load(tmp_path / "params.yaml") == params.model_copy(update={"seed": 7})
    assert "# only if network.classes" in (tmp_path / "params.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pairs.background", "rot", "must be an opaque colour, such as white or #ffffff"),
        ("pairs.background", "#ffffff00", "must be an opaque colour, such as white or #ffffff"),
        ("shard.value_range", [9, 0], "must be empty or two numbers, the smaller one first"),
        ("evaluate.shown_channels", [0, 1], r"must be one or three numbers below pairs.channels \(1\)"),
        ("evaluate.shown_channels", [1], r"must be one or three numbers below pairs.channels \(1\)"),
    ],
)
def test_pictures_and_arrays_make_sense(field: str, value: Any, message: str) -> None:
    section, name = field.split(".")
    document = yaml_files.overlay(yaml_files.read_yaml(ROOT / "params.yaml"), {section: {name: value}})
    with pytest.raises(UserError, match=f"{field}.* {message}"):
        parameters.validate(document, "params.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"samplers": [{"steps": 5}, {"steps": 1001}]},
            r"evaluate.samplers.1.steps \(1001\) exceeds process.num_timesteps",
        ),
        (
            {"samplers": [{"variance": "learned"}]},
            "evaluate.samplers.0.variance is learned, which needs process.learned",
        ),
        ({"samplers": [{"guidance": 2}]}, "evaluate.samplers.0.guidance needs classes"),
        ({"samplers": [{"stepz": 2}]}, "evaluate.samplers.0.stepz: no such parameter"),
        ({"samplers": [{"steps": 0}]}, "evaluate.samplers.0.steps: input should be greater than or equal to 1"),
        (
            {"samplers": [{"sampler": {"kind": "ddim", "eta": 2}}]},
            "evaluate.samplers.0.sampler.eta: input should be less",
        ),
        ({"samplers": [5]}, r"evaluate.samplers.0: must be a section with fields \(got 5\)"),
        ({"quality_samples": 1}, r"evaluate.quality_samples: must be 0, for none, or at least 20 \(got 1\)"),
        ({"quality_samples": 19}, "evaluate.quality_samples: must be 0, for none, or at least 20"),
        (
            {"samplers": [{"steps": 5}], "quality_samples": 0},
            "evaluate.samplers needs evaluate.quality_samples above 0",
        ),
    ],
)
def test_samples_that_cannot_be_compared(changes: dict[str, Any], message: str) -> None:
    document = yaml_files.overlay(yaml_files.read_yaml(ROOT / "params.yaml"), {"evaluate": changes})
    with pytest.raises(UserError, match=f"^params.yaml: {message}[^;]*(; or set samplers to \\[\\]|; leave it out)?$"):
        parameters.validate(document, "params.yaml")


@pytest.mark.parametrize("samples", [0, 20])
def test_enough_samples_or_none(samples: int) -> None:
    document = yaml_files.overlay(
        yaml_files.read_yaml(ROOT / "params.yaml"), {"evaluate": {"quality_samples": samples}}
    )
    assert parameters.validate(document, "params.yaml").evaluate.quality_samples == samples


def test_samplers_are_laid_over_the_section_sample() -> None:
    document = yaml_files.read_yaml(ROOT / "params.yaml")
    yaml_files.overlay(document, {"evaluate": {"samplers": [{"sampler": "ddim", "guidance": 3}, {}]}})
    yaml_files.overlay(document, {"sample": {"steps": 7}, "network": {"classes": True}})
    params = parameters.validate(document, "params.yaml")
    first, second = (laid_over(params.sample, changes) for changes in params.evaluate.samplers)
    assert (first.sampler.model_dump(), first.guidance, first.steps) == ({"kind": "ddim", "eta": 0.0}, 3.0, 7)
    assert first.spacing == params.sample.spacing
    assert second == params.sample
