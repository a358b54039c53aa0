"""Which models are accepted, and where they are read from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from deploy.service import loop
from deploy.service.models import Model, ModelError, RejectedModel
from deploy.service.sources import Registered, parse
from diffusion.export import digest
from tests.deploy.registry import CHAMPION, broken, changed, malformed, serve

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda _: b"", "does not end with ddpm.sha256"),
        (lambda content: content[:5000], "does not end with ddpm.sha256"),
        (lambda content: digest.seal(digest.check(content)[:5000]), "not an ONNX model that ONNX Runtime can run"),
        (lambda content: content[:5000] + b"x" + content[5001:], "does not match the SHA-256 in ddpm.sha256"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "does not match the SHA-256 in ddpm.sha256"),
        (lambda content: changed(content, version="1"), "ddpm.version is 1, but this service supports 2"),
        (lambda content: changed(content, golden="{}"), "has no golden test that can be run"),
        (lambda content: changed(content, alpha_bar="[0.5]"), "the file was modified"),
        (lambda content: changed(content, steps="many"), "has no golden test that can be run"),
        (lambda content: changed(content, classes="none"), "Expecting value"),
        (broken, "golden test failed"),
        (malformed, "ufunc"),
    ],
)
def test_unusable_models_are_rejected(good: bytes, spoil: Callable[[bytes], bytes], line: str) -> None:
    with pytest.raises(RejectedModel) as error:
        Model(spoil(good), None)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_gpu(good: bytes) -> None:
    model = Model(good, None, device="auto")
    if "CUDAExecutionProvider" in model.session.get_providers():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RejectedModel, match="ONNX Runtime finds no CUDA"):
        Model(good, None, device="cuda")


def test_inputs_are_copied_to_the_gpu_where_it_reads_them(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a simulated GPU: what is bound to it stays in the memory of the CPU."""
    model = Model(good)
    assert set(model._places.values()) == {"cpu"}
    expected = model.sample(2)
    copied, bind = list[tuple[str, tuple[int, ...]]](), ort.OrtValue.ortvalue_from_numpy

    def copy(value: NDArray[Any], device: str) -> ort.OrtValue:
        copied.append((device, value.shape))
        return bind(value)

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", copy)
    model._places[loop.STATE] = "cuda"
    found = model.sample(2)
    assert copied == [("cuda", (3, 2, *model.shape))]
    np.testing.assert_array_equal(found["x_0"], expected["x_0"])


@pytest.mark.parametrize("uri", ["models:/ddpm", "models:/ddpm/latest", "models:/ddpm@a/1", "models:ddpm/1"])
def test_invalid_model_uris(uri: str) -> None:
    with pytest.raises(ModelError, match="must have the form"):
        Registered(uri)


@pytest.mark.usefixtures("store")
def test_a_missing_model(tmp_path: Path) -> None:
    for source in (CHAMPION, "models:/ddpm/7", str(tmp_path / "no.onnx")):
        with pytest.raises(ModelError) as error:
            serve(source)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "name", "alias"),
    [
        ("some/sampler.onnx", "ddpm", None),
        ("student=some/sampler.onnx", "student", None),
        ("./a=b.onnx", "ddpm", None),
        ("models:/digits@champion", "digits", "champion"),
        ("models:/digits/3", "digits", None),
        ("best-1.0=models:/digits@champion", "best-1.0", "champion"),
    ],
)
def test_names(text: str, name: str, alias: str | None) -> None:
    found, source = parse(text)
    assert (found, source.alias) == (name, alias)
