"""Features of images, in which sets of images are compared.

By default those of a small network trained on the data set's own training images: a classifier if they have classes,
and otherwise one that recognizes by how many quarter turns an image was rotated (Gidaris et al. 2018), which needs no
labels, yet depends on what is in the image. Such features suit images that differ from photographs, for which the
usual Inception network was trained; distances in them are comparable only on the same data.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.errors import FileFault, UserError
from diffusion.evaluation.sets import Images, chosen, data_key, data_seed
from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import to_x_0
from diffusion.progress import Progress, say
from diffusion.storage.files import sha256, write_atomic

FEATURES = 32
STEPS, BATCH = 400, 64
"""Length of the training, which bounds its time, whatever the data set."""
MAX_IMAGES = 16384
"""Number of training images that are used, at most."""
MAX_SIDE = 32
"""Larger images are reduced to this side."""
DROPOUT = 0.3
SHIFT = 1 / 8
"""In training, images are shifted by up to this fraction of their side. Without dropout and shifts, the network learns
its images by heart, whose features then differ from those of other images of the same kind."""
TURNS = 4
TOO_NEW = re.compile(r"Opset \d+ is under development|Unsupported model IR version")
"""In errors of ONNX Runtime."""
VERSION = 1
"""Raise this when the network or its training changes."""

Array = NDArray[np.float64]
Uint8 = NDArray[np.uint8]


class Features(Protocol):
    """Maps images uint8 (N, C, H, W) to features (N, D)."""

    description: str
    """Whose features these are, for the names of the figures: `features of ...`."""

    def __call__(self, images: Uint8) -> Array: ...


class Network(nn.Module):
    """Three convolutions, a linear layer to 32 features, and a score for each class or rotation.

    The features have mean 0 and variance 1 on the images it is trained on, so that distances do not depend on their
    scale.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.side = min(max(height, width), MAX_SIDE)
        layers: list[nn.Module] = []
        strides = (2 if self.side > 16 else 1, 2, 2)
        side = self.side
        for before, after, stride in zip((channels, 32, 64), (32, 64, 64), strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            side = -(-side // stride)
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Sequential(nn.Linear(64 * side**2, FEATURES), nn.BatchNorm1d(FEATURES, affine=False))
        self.scores = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 32) and scores (B, classes) of square images (B, C, side, side) in [-1, 1]."""
        features = self.features(F.dropout(self.convolutions(x), DROPOUT, self.training))
        return features, self.scores(F.relu(features))

    def prepared(self, images: Uint8) -> Tensor:
        """Images (N, C, H, W) in [-1, 1], resized to (N, C, side, side); other aspect ratios are distorted."""
        x = torch.from_numpy(to_x_0(images, np.float32))
        size = (self.side, self.side)
        return x if x.shape[2:] == size else F.interpolate(x, size, mode="area")


class OwnFeatures:
    """Features of a network trained on the data set's own training images; runs on the CPU, for the same bytes."""

    def __init__(self, net: Network, supervised: bool) -> None:
        self.net, self.supervised = net.eval(), supervised
        net_of = "a classifier trained on this data" if supervised else "a network trained on this data's rotations"
        self.description = f"features of {net_of}"

    def __call__(self, images: Uint8) -> Array:
        return self._outputs(images)[0].astype(np.float64)

    def classes(self, images: Uint8) -> NDArray[np.int64]:
        """The class, or rotation, with the highest score of each image, (N,)."""
        return self._outputs(images)[1].argmax(axis=1)

    def recognized(self, images: Images) -> NDArray[np.bool_]:
        """For each image, whether its class is recognized, or the rotation by as many quarter turns as its index."""
        if self.supervised:
            labelled = images.labels >= 0
            return self.classes(images.pixels[labelled]) == images.labels[labelled]
        turns = np.arange(len(images.pixels)) % TURNS
        with torch.inference_mode():
            x = _rotated(self.net.prepared(images.pixels), torch.from_numpy(turns))
            found = torch.cat([self.net(part)[1].argmax(dim=1) for part in x.split(500)])
        return found.numpy() == turns

    @torch.inference_mode()
    def _outputs(self, images: Uint8) -> list[NDArray[np.float32]]:
        parts = [self.net(self.net.prepared(part)) for part in np.array_split(images, -(-len(images) // 500))]
        return [torch.cat(outputs).numpy() for outputs in zip(*parts, strict=True)]


def trained_features(train: Pairs, cache: Path, stage: str = "evaluate") -> OwnFeatures:
    """The features of a data set, trained once and kept in `cache`; a damaged file there is replaced.

    `stage` is the one whose progress it is.

    They are a function of the images and classes alone, not of their order, the seed or the process, so that runs on
    the same data have the same features; and, like all training, of the number of threads and the machine's vector
    instructions, which change the last bits of the weights.
    """
    images = chosen([train], MAX_IMAGES)
    supervised = len(np.unique(images.labels[images.labels >= 0])) > 1
    net = _new(train, supervised)
    facts = [VERSION, data_key(train.manifest), torch.__version__, torch.get_num_threads()]
    name = hashlib.sha256(json.dumps([*facts, torch.backends.cpu.get_cpu_capability()]).encode()).hexdigest()[:16]
    path, digest = cache / f"{name}.safetensors", cache / f"{name}.sha256"
    if path.exists():
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != digest.read_text().strip():
                raise ValueError("digest mismatch")
            net.load_state_dict(load(content))
            return OwnFeatures(net, supervised)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            say(f"{stage}: the features in {path} are corrupt ({error}); training them again")
    net = _train(_new(train, supervised), images, supervised, data_seed(train.manifest), stage)
    content = save({key: tensor.contiguous() for key, tensor in net.state_dict().items()})
    write_atomic(digest, f"{hashlib.sha256(content).hexdigest()}\n".encode())
    write_atomic(path, content)
    return OwnFeatures(net, supervised)


def _new(train: Pairs, supervised: bool) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(data_seed(train.manifest), Purpose.FEATURES).integers(2**63)))
        return Network(train.shape, len(train.manifest.classes) if supervised else TURNS)


def _train(net: Network, images: Images, supervised: bool, seed: int, stage: str) -> Network:
    """Train the network to recognize the classes of the images that have one, or random rotations of all."""
    if supervised:
        images = images.part(np.flatnonzero(images.labels >= 0))
    generator, reach = stream(seed, Purpose.FEATURES, high=1), int(net.side * SHIFT)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    with torch.random.fork_rng(devices=[]), Progress(stage, STEPS, "steps") as progress:
        torch.manual_seed(int(generator.integers(2**63)))  # of dropout
        for _ in range(STEPS):
            batch = generator.integers(len(images.pixels), size=BATCH)
            padded = F.pad(net.prepared(images.pixels[batch]), (reach,) * 4, mode="replicate")
            top, left = generator.integers(2 * reach + 1, size=2)
            x = padded[..., top : top + net.side, left : left + net.side]
            y = torch.from_numpy(images.labels[batch] if supervised else generator.integers(TURNS, size=BATCH))
            _, scores = net(x if supervised else _rotated(x, y))
            optimizer.zero_grad()
            F.cross_entropy(scores, y, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            progress.advance(1, "training features for comparing images")
    return net


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Square images (B, C, S, S), each rotated by its number of quarter turns."""
    rotated = torch.stack([torch.rot90(x, turn, (2, 3)) for turn in range(TURNS)])
    return rotated[turns, torch.arange(len(x))]


class OnnxFeatures:
    """Features of a network in an ONNX file, which has one input and may have any number of outputs.

    It gets float32 (N, C, H, W) in [0, 1] with the size and number of channels that it asks for; where it leaves the
    size open, that of the images. Its first output is (N, D). A normalization belongs into the file. ONNX files contain
    no code, unlike TorchScript; they must contain their weights.

    Raises:
        UserError: the file is missing, has another digest or cannot be used; the message names it.
    """

    BATCH = 32
    LARGEST = 1e20
    """Of a feature; the kernel distance and its spread need powers of it that are finite."""

    def __init__(self, path: Path, digest: str, shape: tuple[int, int, int]) -> None:
        import onnxruntime as ort

        if not path.is_file():
            problem = "not a file" if path.exists() else "no such file here"
            raise UserError(f"evaluate.features: {path}: {problem}; give an absolute path, or one tracked by git")
        if digest != (found := sha256(path)):
            raise UserError(
                f"evaluate.features_sha256: {path} has the SHA-256 {found}, not {digest or 'an empty one'}; if this is "
                f"the file to use, `ddpm set evaluate.features_sha256={found}`"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised in any case
        # By default weights are also read from files in the current folder, which the digest does not cover.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        try:
            self._session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class
            if TOO_NEW.search(str(error)):
                newer = f"its opset or IR version is newer than ONNX Runtime {ort.__version__} supports"
                raise FileFault(path, f"{newer}; export it for an older one") from None
            raise FileFault(path, f"not an ONNX model that contains its weights ({_reason(error)})") from None
        inputs, self._path = self._session.get_inputs(), path
        size = inputs[0].shape if [each.type for each in inputs] == ["tensor(float)"] else []
        if len(size) != 4 or 0 in size:
            raise FileFault(path, "needs exactly one input, float32 (N, C, H, W)")
        self._input = inputs[0].name
        self._batch = size[0] if isinstance(size[0], int) else 0
        wanted = [asked if isinstance(asked, int) else own for asked, own in zip(size[1:], shape, strict=True)]
        self._channels, self._size = wanted[0], (wanted[1], wanted[2])
        if self._channels != shape[0] and (self._channels, shape[0]) not in ((3, 1), (3, 4)):
            raise FileFault(path, f"takes {self._channels} channels, but the images have {shape[0]}")
        self.description = f"features of {path.name}"

    def __call__(self, images: Uint8) -> Array:
        step = self._batch or self.BATCH
        return np.concatenate([self._run(images[first : first + step]) for first in range(0, len(images), step)])

    def _run(self, images: Uint8) -> Array:
        x = torch.from_numpy(images / np.float32(255))
        x = x.expand(-1, self._channels, -1, -1) if len(x[0]) == 1 else x[:, : self._channels]
        if x.shape[2:] != self._size:
            x = F.interpolate(x, self._size, mode="bilinear", antialias=True).clip(0, 1)
        missing = max(self._batch - len(x), 0)  # of a fixed number of images
        padded = torch.cat([x, x[:1].expand(missing, -1, -1, -1)])
        try:
            features = np.asarray(self._session.run(None, {self._input: padded.contiguous().numpy()})[0], np.float64)
        except Exception as error:
            raise FileFault(self._path, f"cannot be run ({_reason(error)})") from None
        if features.ndim != 2 or len(features) != len(padded) or not features.size:
            raise FileFault(
                self._path, f"its first output must be (N, D), here N = {len(padded)} (got {features.shape})"
            )
        if not (np.abs(features) <= self.LARGEST).all():
            raise FileFault(self._path, f"its first output must be finite, and at most {self.LARGEST:g}")
        return features[: len(x)]


def chosen_features(root: Path, name: str, digest: str, shape: tuple[int, int, int]) -> Features | None:
    """Those of the ONNX file `name` in the working tree `root`; None for auto. Raises the errors of OnnxFeatures."""
    return None if name == "auto" else OnnxFeatures(root / name, digest, shape)


def _reason(error: Exception) -> str:
    """An error of ONNX Runtime in one line, without its own source file and function."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", " ".join(str(error).split()))
    return re.sub(r" : /\S+:\d+ .*?\) (?=[A-Z])", ": ", text)
