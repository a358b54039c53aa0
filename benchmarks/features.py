"""Fréchet distance between sets of images, over the features of a small classifier.

The classifier is trained on the same images as the diffusion model, so its features suit the data. The distance is not
the FID, and comparable only on the same data.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import to_x_0
from flows.paths import Paths

FEATURES = 32
Images = NDArray[np.uint8]
"""(N, C, H, W)"""


class Classifier(nn.Module):
    """Three convolutions, a linear layer to 32 features, and class scores."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.features = nn.LazyLinear(FEATURES)
        self.scores = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 32) and scores (B, classes) of images (B, C, H, W) in [-1, 1]."""
        features = self.features(self.convolutions(x).flatten(1))
        return features, self.scores(F.relu(features))


@dataclass(frozen=True)
class FeatureReference:
    """A trained classifier, with the mean and covariance of its features on the training images."""

    classifier: Classifier
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    accuracy: float
    """Accuracy on the test images."""

    def distance(self, images: Images) -> float:
        """Fréchet distance between the features of `images` and of the training images; Heusel et al. 2017, eq. 6."""
        mean, covariance = moments(features(self.classifier, images))
        values, vectors = np.linalg.eigh(self.covariance)
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        cross = np.sqrt(np.linalg.eigvalsh(root @ covariance @ root).clip(0)).sum()
        return float(np.square(mean - self.mean).sum() + np.trace(covariance) + np.trace(self.covariance) - 2 * cross)


def split(paths: Paths, name: str) -> tuple[Images, NDArray[np.int64]]:
    """Images and labels of a split of data/pairs."""
    pairs = Pairs(paths.pairs, name)  # type: ignore[arg-type]
    blocks = range(pairs.blocks)
    return np.concatenate([pairs.x_0(b) for b in blocks]), np.concatenate([pairs.labels(b) for b in blocks])


def fit_reference(paths: Paths, steps: int = 1500, batch_size: int = 128, seed: int = 0) -> FeatureReference:
    """Train the classifier on the training split, and measure its features there."""
    torch.manual_seed(seed)
    images, labels = split(paths, "train")
    x, y = as_tensor(images), torch.from_numpy(labels)
    classifier = Classifier(images.shape[1], int(labels.max()) + 1)
    classifier(x[:2])  # initializes the lazy layer
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (batch_size,))
        _, scores = classifier(x[batch])
        optimizer.zero_grad()
        F.cross_entropy(scores, y[batch], label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    test_images, test_labels = split(paths, "test")
    with torch.inference_mode():
        found = torch.cat([classifier(part)[1].argmax(dim=1) for part in as_tensor(test_images).split(500)])
    accuracy = float((found.numpy() == test_labels).mean())
    return FeatureReference(classifier, *moments(features(classifier, images)), accuracy)


def as_tensor(images: Images) -> Tensor:
    return torch.from_numpy(to_x_0(images, np.float32))


@torch.inference_mode()
def features(classifier: Classifier, images: Images) -> NDArray[np.float64]:
    """Features (N, 32) of images."""
    parts = [classifier(part)[0].double().numpy() for part in as_tensor(images).split(500)]
    return np.concatenate(parts)


def moments(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of features (N, 32)."""
    return values.mean(axis=0), np.cov(values, rowvar=False)
