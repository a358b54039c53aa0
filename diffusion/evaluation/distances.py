"""Distances between two sets of images, from their features.

Each function compares x (n, D), usually of generated images, with y (m, D), of real ones. Sets of another size give
other values, even from the same distribution: compare figures only at the same n, m and features.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Counts = NDArray[np.integer | np.bool_]

PRECISION_NEIGHBOURS = 3
"""k of precision and recall, as in Kynkäänniemi et al. 2019."""
DENSITY_NEIGHBOURS = 5
"""k of density and coverage, as in Naeem et al. 2020."""
KID_SUBSET = 1000
"""Largest number of images in a subset for the kernel distance."""
ROWS = 1024
"""Number of rows of a matrix of distances that are in memory at once."""


def frechet(x: Array, y: Array, counts: Counts | None = None) -> Array:
    """Fréchet distance between the normal distributions with the sets' moments; Heusel et al. 2017, eq. 6.

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_y^1/2 S_x S_y^1/2)^1/2). It is biased upwards, the more the fewer images.

    counts: how often each image of x is in each of B sets, (B, n), whose distances are returned, (B,); by default x
    itself, (1,).
    """
    counts = np.ones((1, len(x)), np.int64) if counts is None else counts
    if len(y) < y.shape[1]:  # the covariance has as many eigenvalues above zero as there are images, at most
        _, singular, rows = np.linalg.svd(y - y.mean(axis=0), full_matrices=False)
        values, vectors = np.square(singular) / (len(y) - 1), rows.T
    else:
        values, vectors = np.linalg.eigh(np.cov(y, rowvar=False).reshape(y.shape[1], -1))
    centred = x - y.mean(axis=0)
    # In these coordinates the covariance of x is S_y^1/2 S_x S_y^1/2. Its eigenvalues do not change under a rotation
    # into the span of the images, which has fewer dimensions if there are fewer images than features.
    z = centred @ (vectors * np.sqrt(values.clip(0)))
    if len(x) < z.shape[1]:
        left, singular, _ = np.linalg.svd(z, full_matrices=False)
        z = left * singular
    found = np.empty(len(counts))
    for index, count in enumerate(counts):
        weights = (count / count.sum())[:, None]
        mean, mean_z = (weights * centred).sum(axis=0), (weights * z).sum(axis=0)
        unbiased = count.sum() / (count.sum() - 1)
        trace = (weights * np.square(centred - mean)).sum() * unbiased
        covariance = (weights * (z - mean_z)).T @ (z - mean_z) * unbiased
        cross = np.sqrt(np.linalg.eigvalsh(covariance).clip(0)).sum()
        found[index] = np.square(mean).sum() + trace + values.clip(0).sum() - 2 * cross
    return found


def kid(x: Array, y: Array, counts: Counts | None = None) -> Array:
    """Kernel distance, the squared maximum mean discrepancy with the kernel (a b / D + 1)^3; Bińkowski et al. 2018.

    The estimate is unbiased, so negative values are possible. It is the mean over disjoint subsets of at most
    KID_SUBSET images of x: with as many images or fewer, all pairs of images count.

    counts: as in `frechet`. Copies of an image are not compared with each other.
    """
    counts = np.ones((1, len(x)), np.int64) if counts is None else counts
    parts = -(-len(x) // KID_SUBSET)
    columns = np.array_split(np.arange(len(x)), parts)
    total = np.zeros(len(counts))
    for members, others in zip(columns, np.array_split(y, parts), strict=True):
        count, chosen = counts[:, members].astype(np.float64), x[members]
        n, m = count.sum(axis=1), len(others)
        within = _kernel(chosen, chosen)
        np.fill_diagonal(within, 0)
        of_y = _kernel(others, others)
        same_x = ((count @ within) * count).sum(axis=1) / (n**2 - np.square(count).sum(axis=1))
        same_y = (of_y.sum() - np.trace(of_y)) / (m * (m - 1))
        total += same_x + same_y - 2 * (count @ _kernel(chosen, others).sum(axis=1)) / (n * m)
    return total / parts


def _kernel(a: Array, b: Array) -> Array:
    return (a @ b.T / a.shape[1] + 1) ** 3


class Neighbours(NamedTuple):
    """What holds for each image of x, whose means are the figures, and for the images of y together."""

    precision: Array
    """(n,): whether an image of x is as near to some image of y as the third-nearest other image of y is to the latter
    (Kynkäänniemi et al. 2019, eq. 2)."""
    recall: Array
    """(B,): share of the images of y for which the same holds with the sets exchanged."""
    density: Array
    """(n,): the number of images of y that have this image of x among their surroundings, up to the fifth-nearest
    neighbour in y, divided by 5; 1 on average for equal distributions (Naeem et al. 2020, eq. 3)."""
    coverage: Array
    """(B,): share of the images of y that have one of x in their surroundings (Naeem et al. 2020, eq. 4)."""


def neighbours(x: Array, y: Array, counts: Counts | None = None) -> Neighbours:
    """Precision, recall, density and coverage; both sets need more than DENSITY_NEIGHBOURS images.

    counts: as in `frechet`; the distances to the neighbours in x remain those in all of x.
    """
    counts = (np.ones((1, len(x)), bool) if counts is None else counts).astype(np.float32)
    near, wide = _neighbour_distances(y, (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS))
    (of_x,) = _neighbour_distances(x, (PRECISION_NEIGHBOURS,))
    precision, density = np.empty(len(x)), np.empty(len(x))
    recalled, covered = (np.zeros((len(counts), len(y)), np.float32) for _ in range(2))
    for first in range(0, len(x), ROWS):
        rows = slice(first, first + ROWS)
        squares = squared_distances(x[rows], y)
        precision[rows] = (squares <= near).any(axis=1)
        density[rows] = (squares <= wide).sum(axis=1) / DENSITY_NEIGHBOURS
        recalled += counts[:, rows] @ (squares <= of_x[rows, None]).astype(np.float32)
        covered += counts[:, rows] @ (squares <= wide).astype(np.float32)
    recall, coverage = ((found > 0).mean(axis=1) for found in (recalled, covered))
    return Neighbours(precision, recall, density, coverage)


def _neighbour_distances(values: Array, ranks: tuple[int, ...]) -> list[Array]:
    """Squared distance of each item to its k-th nearest other one, (n,) for each k in `ranks`."""
    found = [np.empty(len(values)) for _ in ranks]
    for first in range(0, len(values), ROWS):
        squares = squared_distances(values[first : first + ROWS], values)
        squares[np.arange(len(squares)), first + np.arange(len(squares))] = -1  # itself comes first
        ordered = np.partition(squares, ranks, axis=1)
        for column, rank in zip(found, ranks, strict=True):
            column[first : first + ROWS] = ordered[:, rank]
    return found


def squared_distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
    """Squared Euclidean distances between the rows of two matrices, (len(a), len(b))."""
    return (np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T).clip(0)
