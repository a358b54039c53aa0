"""Parameters, presets and the commands that show them."""

from pathlib import Path

import pytest

from diffusion import params as parameters
from diffusion import presets, yaml_files
from diffusion.__main__ import main
from diffusion.errors import UserError
from diffusion.params import Params

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "presets"


@pytest.mark.parametrize("name", presets.names(PRESETS))
def test_every_preset_is_complete(name: str) -> None:
    assert isinstance(parameters.load(PRESETS / f"{name}.yaml"), Params)


def test_params_yaml_holds_the_digits_preset(params: Params) -> None:
    assert params == parameters.load(PRESETS / "digits.yaml")


def test_every_field_is_described_and_read_somewhere() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("diffusion", "flows")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "params.py"
    )
    for section in parameters.SECTIONS.values():
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
    assert parameters.load(Path("params.yaml")) == parameters.load(PRESETS / "cifar10.yaml")
    assert "# a GPU where there is one" in Path("params.yaml").read_text(encoding="utf-8")
    assert main(["preset", "digits"]) == 0
    assert parameters.load(Path("params.yaml")) == parameters.load(PRESETS / "digits.yaml")
    assert main(["preset", "cifar"]) == 1
    assert capsys.readouterr().err == (
        "ddpm preset: error: preset 'cifar': no such preset; there are cifar10, digits, fashion-mnist (in presets/)\n"
    )


def test_ddpm_params_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params"]) == 0
    shown = capsys.readouterr().out
    for name, section in parameters.SECTIONS.items():
        assert f"\n{name}: " in shown
        assert all(f"\n  {field}: " in shown for field in section.model_fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "not valid YAML"),
        ("- 1\n", "expected sections with fields, found CommentedSeq"),
        ("seed: 1\n", "device: missing (presets/digits.yaml has every field)"),
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


def test_overlay_merges_mappings_and_replaces_the_rest() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert yaml_files.overlay(base, {"a": {"c": [9]}, "d": 4}) == {"a": {"b": 1, "c": [9]}, "d": 4}
