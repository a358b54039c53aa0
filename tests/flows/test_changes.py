"""Changing parameters: kinds with their fields, fields, earlier versions; on the command line and in flow runs."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffusion.errors import UserError
from diffusion.nn.uvit import UViTOptions
from flows import params as parameters
from flows import workspace, yaml_files
from flows.__main__ import main
from flows.changes import lay_over
from flows.flow_run import parameters as parameters_of
from flows.gate import Better, Limit, NotWorse
from flows.parameters import given
from flows.params import Params

UVIT = UViTOptions().model_dump(mode="json")


@pytest.fixture
def tree(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "params.yaml", tmp_path)
    return tmp_path


def read(tree: Path) -> Any:
    return yaml_files.read_yaml(tree / "params.yaml")


@pytest.mark.parametrize(
    ("before", "changes", "after"),
    [
        ("ddpm", "ddim", {"kind": "ddim", "eta": 0.0}),
        ("ddpm", {"kind": "ddim"}, {"kind": "ddim", "eta": 0.0}),
        ("ddpm", {"kind": "ddim", "eta": 0.3}, {"kind": "ddim", "eta": 0.3}),
        ({"kind": "ddim", "eta": 0.3}, "ddim", {"kind": "ddim", "eta": 0.3}),
        ({"kind": "ddim", "eta": 0.3}, {"eta": 0.4}, {"kind": "ddim", "eta": 0.4}),
        ({"kind": "ddim", "eta": 0.3}, "heun", "heun"),
        ({"kind": "ddim", "eta": 0.3}, {"kind": "heun"}, "heun"),
        ({"kind": "ddim", "eta": 0.3}, {"steps": 3}, None),  # invalid: left to validation
        ({"kind": "ddim", "eta": 0.3}, "dim", "dim"),
        ("ddpm", {"eta": 1.0}, {"kind": "ddpm", "eta": 1.0}),
        ("ddpm", 5, 5),
    ],
)
def test_selecting_a_kind_adds_its_fields(before: Any, changes: Any, after: Any) -> None:
    document = {"sample": {"sampler": copy.deepcopy(before), "steps": 10}}
    given = {"sample": {"sampler": changes}}
    kept = copy.deepcopy(given)
    made = lay_over(document, given)
    assert made == {"sample": {"sampler": before | changes if after is None else after, "steps": 10}}
    assert given == kept


def test_a_flow_run_with_another_network_uses_its_defaults() -> None:
    for text in ('network={"kind": "uvit"}', 'network="uvit"', "network=uvit"):
        assert workspace.document(None, given(parameters_of([text])))["network"] == UVIT
    deep = workspace.document("cifar10", given(parameters_of(['network={"kind": "uvit", "depth": 5}'])))
    assert deep["network"] == UVIT | {"depth": 5}
    wide = workspace.document("cifar10", given(parameters_of(['network={"dropout": 0.5}'])))
    assert wide["network"]["base_channels"] == 128
    with pytest.raises(UserError, match=r"network.channel_multipliers: no such parameter of uvit"):
        workspace.document(None, {"network": {"kind": "uvit", "channel_multipliers": [1]}})


def test_ddpm_set_changes_fields_and_kinds(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (tree / "params.yaml").read_text(encoding="utf-8").replace("train:", "# About train\ntrain: # here")
    (tree / "params.yaml").write_text(text, encoding="utf-8")
    changes = ("train.steps=500", "network.kind=uvit", "network.depth=3", "sample.sampler=ddim", "seed=9")
    assert main(["set", *changes, "sample.sampler.eta=1", "network.classes=true"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {"train.steps: 500", 'network.kind: "uvit"', 'sample.sampler: "ddim"', "sample.sampler.eta: 1"} <= set(shown)
    assert 'network.conditioning: "token"' in shown  # fields added with the kind are shown as well
    assert "network.convention: removed" in shown
    made = parameters.load(tree / "params.yaml")
    assert (made.train.steps, made.seed) == (500, 9)
    assert made.network == UViTOptions(depth=3, classes=True)
    assert made.sample.sampler.eta == 1
    text = (tree / "params.yaml").read_text(encoding="utf-8")
    assert "# a GPU if available" in text
    assert "\n\n# About train\ntrain: # here\n" in text
    assert main(["set", "network.kind=unet", "sample.sampler=heun", "network.attention_levels=[0]"]) == 0
    assert parameters.load(tree / "params.yaml").network == Params().network.model_copy(
        update={"attention_levels": (0,)}
    )
    assert read(tree)["sample"]["sampler"] == "heun"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.steps", "'train.steps': must be NAME=VALUE in one line, such as train.steps=500"),
        ("train..steps=5", "'train..steps=5': must be NAME=VALUE in one line"),
        ("shard.source=a\nb", r"'shard.source=a\nb': must be NAME=VALUE in one line"),
        (
            "train.steps=-1",
            "params.yaml with seed=3 train.steps=-1: train.steps: input should be greater",
        ),
        ("train.stepz=5", "train.stepz: no such parameter"),
        ("network.kind=mlp", "network.kind: input should be 'unet' or 'uvit' (got 'mlp')"),
        ("network.depth=3", "network.depth: no such parameter of unet (got 3); `ddpm set NAME.kind=KIND` changes"),
        ("sample.sampler.eta=1", "sample.sampler.eta: no such parameter of dpm-solver++-sde"),
        ("train=5", "train: must be a section with fields (got 5)"),
        ("=5", "'=5': must be NAME=VALUE in one line"),
        ("train.steps=!!int 5", "train.steps: input should be a valid integer (got '!!int 5')"),
        ("train.steps=5 # five", "train.steps: input should be a valid integer (got '5 # five')"),
        ("seed=4", "seed: given twice; give it once, a choice before its fields"),
        ("seed.x=4", "seed"),
        ("tracking.gate.kid.by=1", "tracking.gate: must be a list such as"),
        ("tracking.gate=[{kind: better, figure: fid, by: 0}]", "tracking.gate.0.figure: input should be 'val_mse', "),
        ("tracking.gate=[{kind: best, figure: kid}]", "tracking.gate.0.kind: input should be 'limit', 'better' or"),
        ("sample.eta=0.5", "sample.eta: no such parameter\n"),
        (
            "train.optimizer.kind=[muon]",
            "input should be 'adamw', 'muon' or 'sgd' (got ['muon'])",
        ),
    ],
)
def test_ddpm_set_rejects_invalid_changes_and_writes_nothing(
    tree: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tree / "params.yaml").read_bytes()
    assert main(["set", "seed=3", change]) == (2 if "NAME=VALUE" in message or "given twice" in message else 1)
    error = capsys.readouterr().err
    assert error.startswith("ddpm set: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert (tree / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "value",
    [
        "a  b" * 100,
        "2020-01-01",
        "=",
        "yes",
        "1_000",
        "a: b",
        "a #b",
        "'a'",
        "日本",
        "- a",
        "[1",
        "~",
        " a",
        "x" * 5000,
    ],
)
def test_text_is_read_back_as_written(tree: Path, value: str) -> None:
    path = tree / "params.yaml"
    document = read(tree)
    document["tracking"]["experiment"] = value
    yaml_files.write_yaml(path, document)
    assert read(tree)["tracking"]["experiment"] == value
    before = path.read_bytes()
    assert main(["set", "seed=0"]) == 0
    assert main(["set", "seed=1"]) == 0
    assert path.read_bytes() == before.replace(b"\nseed: 0", b"\nseed: 1").replace(b"seed: 0", b"seed: 1", 1)


def test_what_yaml_cannot_hold_is_not_written(tree: Path) -> None:
    before = (tree / "params.yaml").read_bytes()
    with pytest.raises(UserError, match="not written, since it would be read back differently"):
        yaml_files.write_yaml(tree / "params.yaml", {"a": "x\x85y"})
    assert (tree / "params.yaml").read_bytes() == before


def test_line_endings_are_kept(tree: Path) -> None:
    path = tree / "params.yaml"
    windows = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(windows)
    assert main(["set", "seed=1"]) == 0
    assert path.read_bytes() == windows.replace(b"seed: 0", b"seed: 1", 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a # b", "a # b"),
        ("&a b", "&a b"),
        ("*a", "*a"),
        ("!a b", "!a b"),
        (" 'a b' ", "a b"),
        ("'a' # b", "'a' # b"),
        ("5", 5),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("[1, 2] # b", "[1, 2] # b"),
        ("{kind: a}", {"kind": "a"}),
        ("2020-01-01", "2020-01-01"),
        ("=", "="),
        ("!!int '5'", "!!int '5'"),
        ("[&a 1, *a]", "[&a 1, *a]"),
        ("[!x 1]", "[!x 1]"),
        ("a\u00a0", "a\u00a0"),
    ],
)
def test_no_part_of_a_value_is_dropped(text: str, right: object) -> None:
    assert yaml_files.scalar(text) == right


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  <<: {channel_multipliers: [1, 2]}", "params.yaml: merge keys (<<) are not supported: write the values out"),
        ("  channel_multipliers: &a [1, 2]", "params.yaml: aliases (*name) of sections and lists"),
    ],
)
def test_aliases_and_merge_keys_are_rejected(
    tree: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tree / "params.yaml"
    whole = path.read_text(encoding="utf-8").replace("  channel_multipliers: [1, 2]", text)
    path.write_text(whole.replace("variants: []", "variants: *a") if "&a" in text else whole, encoding="utf-8")
    before = path.read_bytes()
    for command in (["set", "network.kind=uvit"], ["params", "--update"], ["shard"]):
        assert main(command) == 1
        assert message in capsys.readouterr().err
    assert path.read_bytes() == before


def test_ddpm_set_preserves_links_and_modes(tree: Path) -> None:
    (tree / "params.yaml").rename(tree / "real.yaml")
    (tree / "params.yaml").symlink_to("real.yaml")
    (tree / "real.yaml").chmod(0o600)
    assert main(["set", "seed=3"]) == 0
    assert (tree / "params.yaml").is_symlink()
    assert parameters.load(tree / "real.yaml").seed == 3
    assert (tree / "real.yaml").stat().st_mode & 0o777 == 0o600


def test_long_values_give_one_line(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    for value in (5000 * "9", 500 * "["):  # integers, and nesting, that Python refuses
        assert main(["set", f"seed={value}"]) == 1
        assert "seed: input should be a valid integer" in capsys.readouterr().err


def test_a_kind_changed_by_another_tool_is_reported_and_repaired(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """params.yaml as left by `dvc exp run -S network.kind=uvit`."""
    path = tree / "params.yaml"
    text = path.read_text(encoding="utf-8").replace("kind: unet", "kind: uvit")
    path.write_text(text.replace("base_channels: 32", "base_channels: 64"), encoding="utf-8")
    assert main(["shard"]) == 1
    error = capsys.readouterr().err
    assert "network.depth: missing" in error
    assert "network.convention: no such parameter of uvit (got 'ddpm')" in error
    assert error.endswith("; `ddpm set NAME.kind=KIND` changes a kind together with its fields\n")
    assert main(["set", "network.kind=uvit"]) == 0
    assert parameters.load(path).network == UViTOptions(base_channels=64)  # not valid for a transformer: conditioning


def test_params_of_format_1_are_reported_and_converted(
    tree: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(root / "tests" / "format_1" / "params.yaml", tree)
    assert main(["shard"]) == 1
    error = capsys.readouterr().err
    old = "process.beta, process.min_snr_gamma, train.muon_learning_rate, train.ema_width, sample.eta, tracking.max_mse"
    assert error == (
        f"ddpm shard: error: params.yaml: of an earlier version (it has {old}); `ddpm params --update` rewrites "
        "params.yaml\n"
    )
    for command in (["set", "seed=1"], ["preset", "digits"], ["sample"]):
        assert main(command) == 1
        assert "of an earlier version" in capsys.readouterr().err
    with pytest.raises(UserError, match="of an earlier version"):
        workspace.document(None, {})
    assert main(["params", "--update"]) == 0
    shown = capsys.readouterr().out
    assert "train.optimizer.learning_rate: 0.01\n" in shown
    assert "train.ema.width: 0.05\n" in shown
    assert "network.depth: removed\n" in shown
    assert main(["params", "--update"]) == 0
    assert capsys.readouterr().out == "params.yaml: nothing to change\n"
    digits = yaml_files.read_yaml(root / "params.yaml")
    assert read(tree) == lay_over(digits, {"network": {"fourier_features": []}})  # there were none


def test_the_former_limit_becomes_a_rule_of_the_gate(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tree / "params.yaml"
    before, gate, _ = path.read_text(encoding="utf-8").partition("  gate:")
    assert gate
    path.write_text(f"{before}  max_mse: 0.06\n", encoding="utf-8")
    assert main(["track"]) == 1
    assert capsys.readouterr().err == (
        "ddpm track: error: params.yaml: of an earlier version (it has tracking.max_mse); `ddpm params --update` "
        "rewrites params.yaml\n"
    )
    assert main(["params", "--update"]) == 0
    assert "tracking.max_mse: removed\n" in capsys.readouterr().out
    assert parameters.load(path).tracking.gate == (Limit(figure="val_mse", value=0.06), Better(figure="val_mse", by=0))


def test_ddpm_set_replaces_the_rules_of_the_gate(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = "[{kind: better, figure: val_mse, by: 0}, {kind: not-worse, figure: kid, by: 0.01}]"
    assert main(["set", f"tracking.gate={rules}"]) == 0
    assert capsys.readouterr().out.startswith('tracking.gate: [{"kind": "better", "figure": "val_mse", "by": 0}, {')
    made = parameters.load(tree / "params.yaml").tracking
    assert made.gate == (Better(figure="val_mse", by=0), NotWorse(figure="kid", by=0.01))
    assert "  gate: # rules" in (tree / "params.yaml").read_text(encoding="utf-8")
    assert main(["set", "evaluate.samplers=[{sampler: ddim, steps: 10}]"]) == 0
    assert capsys.readouterr().out.endswith('evaluate.samplers: [{"sampler": "ddim", "steps": 10}]\n')
    assert main(["set", "tracking.gate=[]"]) == 0
    assert parameters.load(tree / "params.yaml").tracking.gate == ()


def test_an_update_keeps_valid_values_and_adds_missing_fields(tree: Path) -> None:
    document = read(tree)
    document["network"] = {"kind": "uvit", "depth": 5}
    document["sample"]["sampler"] = "ddim"
    document["train"]["optimizer"] = "adamw"
    del document["evaluate"]
    yaml_files.write_yaml(tree / "params.yaml", document)
    assert main(["params", "--update"]) == 0
    made = parameters.load(tree / "params.yaml")
    assert made.network == UViTOptions(depth=5)
    assert read(tree)["sample"]["sampler"] == {"kind": "ddim", "eta": 0.0}
    assert made.train.optimizer.kind == "adamw"
    assert made.evaluate == Params().evaluate


@pytest.mark.parametrize(
    ("before", "filled"),
    [
        ("variants: [] # fp16, int8", "variants: [int8] # fp16, int8"),
        ("variants: []", "variants: [int8]"),
        ("variants: [fp16] # one", "variants: [int8] # one"),
        ("variants:\n    - fp16\n    - fp32 # half", "variants:\n    - int8"),
        ("variants: # one\n    - fp16 # half", "variants: # one\n    - int8"),
        ("variants:\n    # one\n    - fp16", "variants:\n    # one\n    - int8"),
    ],
)
def test_changing_a_list_preserves_its_format(before: str, filled: str, tmp_path: Path) -> None:
    path, behind = tmp_path / "params.yaml", "\n\n  # behind it\n  steps: 9\n"
    path.write_text(f"export:\n  {before}{behind}", encoding="utf-8")
    for values in (["int8"], [], ["fp16", "int8"], []):
        yaml_files.write_yaml(path, lay_over(yaml_files.read_yaml(path), {"export": {"variants": values}}))
        text = path.read_text(encoding="utf-8")
        if values == ["int8"]:
            assert text == f"export:\n  {filled}{behind}"
        assert text.endswith(behind) or "# one\n" in before
        assert yaml_files.read_yaml(path) == {"export": {"variants": values, "steps": 9}}
