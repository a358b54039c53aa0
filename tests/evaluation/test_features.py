"""The features in which images are compared: trained ones and their cache, and those of ONNX files."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffusion.errors import UserError
from diffusion.evaluation import features
from diffusion.evaluation.features import Network, OnnxFeatures, OwnFeatures, trained_features
from diffusion.evaluation.sets import chosen
from diffusion.pairs.pairs import Pairs


@pytest.fixture
def train(pairs_tree: Path) -> Pairs:
    return Pairs(pairs_tree / "data/pairs", "train")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "STEPS", 20)


def test_the_classes_of_held_out_images_are_recognized(pairs_tree: Path, train: Pairs, tmp_path: Path) -> None:
    found = trained_features(train, tmp_path)
    held_out = chosen([Pairs(pairs_tree / "data/pairs", split) for split in ("val", "test")], 1000)
    assert found.description == "features of a classifier trained on this data"
    assert found.recognized(held_out).mean() > 0.95
    x = found(chosen([train], 1000).pixels)
    assert x.shape == (1000, 32)
    assert x.dtype == np.float64
    np.testing.assert_allclose(x.std(axis=0), 1, atol=0.25)


def test_without_classes_rotations_are_recognized(
    pairs_tree: Path, train: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pairs, "labels", lambda self, block: np.full(self.size(block), -1))
    found = trained_features(train, tmp_path)
    held_out = chosen([Pairs(pairs_tree / "data/pairs", split) for split in ("val", "test")], 1000)
    assert found.description == "features of a network trained on this data's rotations"
    assert found.recognized(held_out).mean() > 0.5  # by chance 0.25


@pytest.mark.usefixtures("short")
def test_features_are_trained_once_and_a_damaged_file_is_replaced(
    train: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = trained_features(train, tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    content, written = weights.read_bytes(), weights.stat().st_mtime_ns
    again = trained_features(train, tmp_path)
    assert weights.stat().st_mtime_ns == written
    images = chosen([train], 10).pixels
    np.testing.assert_array_equal(first(images), again(images))
    capsys.readouterr()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    trained_features(train, tmp_path)
    said = capsys.readouterr().err
    assert f"the features in {weights} are corrupt (digest mismatch); training them again" in said
    assert weights.read_bytes() == content


@pytest.mark.usefixtures("short")
def test_the_order_of_the_images_and_the_seed_change_nothing(
    train: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_features(train, tmp_path / "a")
    x_0, labels = Pairs.x_0, Pairs.labels
    monkeypatch.setattr(Pairs, "x_0", lambda self, block: x_0(self, block)[::-1])
    monkeypatch.setattr(Pairs, "labels", lambda self, block: labels(self, block)[::-1])
    train.manifest = train.manifest.model_copy(update={"seed": 5, "schedule": "linear", "draws": 3})
    torch.manual_seed(3)
    trained_features(train, tmp_path / "b")
    (a,), (b,) = ((tmp_path / name).glob("*.safetensors") for name in "ab")
    assert a.name == b.name
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.usefixtures("short")
def test_other_images_have_other_features(train: Pairs, tmp_path: Path) -> None:
    trained_features(train, tmp_path)
    train.manifest = train.manifest.model_copy(update={"shards_sha256": "0" * 64})
    trained_features(train, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (4, 28, 20), (3, 40, 64)])
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    found = OwnFeatures(Network(shape, 2), supervised=True)
    assert found(images).shape == (3, 32)
    assert found.classes(images).shape == (3,)


def test_quarter_turns() -> None:
    x = torch.arange(8.0).reshape(2, 1, 2, 2)
    turned = features._rotated(x, torch.tensor([1, 2]))
    assert turned.tolist() == [[[[1, 3], [0, 2]]], [[[7, 6], [5, 4]]]]


def pooling(path: Path, shape: tuple[int | str, ...], kind: int = TensorProto.FLOAT, outputs: int = 2) -> str:
    """An ONNX model that averages over the pixels; with `outputs` axes in its output. Returns the file's SHA-256."""
    axes = list(range(4))[outputs - 4 :] if outputs < 4 else []
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0, noop_with_empty_axes=1)
    constant = numpy_helper.from_array(np.array(axes, np.int64), "axes")
    x, y = helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([node], "pooling", [x], [y], [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


MEAN = helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0)


def model(path: Path, nodes: list[onnx.NodeProto], inputs: bool = True) -> str:
    """An ONNX model with output y, whose nodes can use an input x and constants. Returns the file's SHA-256."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 1, 6, 6))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = {"axes": np.array([2, 3]), "zero": np.array([0, 0]), "ends": np.array([9, 0])}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([1e25], np.float32), "huge"))
    graph = helper.make_graph(nodes, "model", [x] if inputs else [], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_outside_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest does not cover them."""
    monkeypatch.chdir(tmp_path)
    model(Path("net.onnx"), [MEAN, helper.make_node("Add", ["m", "huge"], ["y"])])
    graph = onnx.load("net.onnx")
    onnx.save_model(graph, "net.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    digest = hashlib.sha256(Path("net.onnx").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"^net\.onnx: not an ONNX model that contains its weights \("):
        OnnxFeatures(Path("net.onnx"), digest, (1, 6, 6))


def test_features_of_an_onnx_file(tmp_path: Path) -> None:
    """Values in [0, 1], grey repeated in three channels, a batch of fixed size filled up, and resized images."""
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 6, 6), np.uint8)
    digest = pooling(tmp_path / "pool.onnx", (2, 3, "H", "W"))
    found = OnnxFeatures(tmp_path / "pool.onnx", digest, (1, 6, 6))
    assert found.description == "features of pool.onnx"
    expected = np.repeat(images.mean(axis=(2, 3)) / 255, 3, axis=1)
    np.testing.assert_allclose(found(images), expected, rtol=1e-6)
    digest = pooling(tmp_path / "large.onnx", ("N", "C", 12, 12))
    flat = np.full((2, 3, 6, 6), 51, np.uint8)
    np.testing.assert_allclose(OnnxFeatures(tmp_path / "large.onnx", digest, (3, 6, 6))(flat), 0.2, rtol=1e-6)
    digest = pooling(tmp_path / "rgb.onnx", ("N", 3, "H", "W"))
    rgba = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 6), np.uint8)
    without_alpha = rgba[:, :3].mean(axis=(2, 3)) / 255
    found = OnnxFeatures(tmp_path / "rgb.onnx", digest, (4, 6, 6))
    np.testing.assert_allclose(found(rgba), without_alpha, rtol=1e-6)


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"

    def refused(digest: str, shape: tuple[int, int, int] = (1, 6, 6)) -> str:
        with pytest.raises(UserError) as raised:
            OnnxFeatures(file, digest, shape)(np.zeros((2, *shape), np.uint8))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert f"evaluate.features: {file}: no such file here" in refused("")
    file.mkdir()
    assert f"evaluate.features: {file}: not a file" in refused("")
    file.rmdir()
    os.mkfifo(file)
    assert f"evaluate.features: {file}: not a file" in refused("")
    file.unlink()
    digest = pooling(file, ("N", 5, 6, 6))
    assert f"{file} has the SHA-256 {digest}, not an empty one; if this is the file to use" in refused("")
    assert f"`ddpm set evaluate.features_sha256={digest}`" in refused("0" * 64)
    assert f"{file}: takes 5 channels, but the images have 1" in refused(digest)
    assert f"{file}: needs exactly one input, float32 (N, C, H, W)" in refused(pooling(file, (2, 3, 4, 5, 6)))
    double = pooling(file, ("N", 1, 6, 6), TensorProto.DOUBLE)
    assert f"{file}: needs exactly one input, float32 (N, C, H, W)" in refused(double)
    three = pooling(file, ("N", 1, 6, 6), outputs=3)
    assert re.search(r"its first output must be \(N, D\), here N = 2 \(got \(2, 1, 6\)\)", refused(three))
    assert f"{file}: needs exactly one input, float32 (N, C, H, W)" in refused(pooling(file, ("N", 1, 0, 6)))
    no_input = helper.make_node("Constant", [], ["y"], value_float=1.0)
    assert f"{file}: needs exactly one input" in refused(model(file, [no_input], inputs=False))
    without = helper.make_node("Slice", ["m", "zero", "ends"], ["y"])
    assert f"{file}: its first output must be (N, D), here N = 2 (got (2, 0))" in refused(model(file, [MEAN, without]))
    for operator, second in (("Log", ()), ("Add", ("huge",))):  # of black images
        infinite = helper.make_node(operator, ["m", *second], ["y"])
        assert f"{file}: its first output must be finite, and at most 1e+20" in refused(model(file, [MEAN, infinite]))
    for opset, ir_version in ((99, 10), (20, 99)):
        model(file, [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)])
        newer = onnx.load(file)
        newer.opset_import[0].version, newer.ir_version = opset, ir_version
        onnx.save(newer, file)
        line = refused(hashlib.sha256(file.read_bytes()).hexdigest())
        assert line.startswith(f"{file}: its opset or IR version is newer than ONNX Runtime {onnxruntime.__version__} ")
    digest = model(file, [helper.make_node("Unheard", ["x"], ["y"])])
    line = refused(digest)
    assert line.startswith(f"{file}: not an ONNX model that contains its weights (INVALID_GRAPH : This is an invalid ")
    file.write_bytes(b"no model")
    digest = hashlib.sha256(b"no model").hexdigest()
    assert f"{file}: not an ONNX model that contains its weights (" in refused(digest)
