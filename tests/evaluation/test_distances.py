"""Distances between sets of features: closed forms, and small examples by hand."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import euclidean_distances, polynomial_kernel

from diffusion.evaluation import distances


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int) -> np.ndarray:
    """Features (n, D) with exactly this sample mean and covariance."""
    x = np.random.default_rng(0).standard_normal((n, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return mean + x @ np.linalg.cholesky(covariance).T


def test_frechet_of_known_moments() -> None:
    """Diagonal covariances: |mu_x - mu_y|^2 + sum (s_x - s_y)^2 of the standard deviations (Dowson & Landau 1982)."""
    x = with_moments(np.array([1.0, 0, 3]), np.diag([1.0, 4, 9]), 50)
    y = with_moments(np.array([0.0, 2, 3]), np.diag([4.0, 4, 1]), 70)
    np.testing.assert_allclose(distances.frechet(x, y), [1 + 4 + 1 + 0 + 4])


def test_frechet_of_any_covariances() -> None:
    generator = np.random.default_rng(1)
    a, b = (np.cov(generator.standard_normal((9, 4)), rowvar=False) for _ in range(2))
    x, y = with_moments(np.zeros(4), a, 30), with_moments(np.ones(4), b, 40)
    expected = 4 + np.trace(a + b - 2 * sqrtm(a @ b).real)
    np.testing.assert_allclose(distances.frechet(x, y), [expected])


def test_frechet_with_fewer_images_than_features() -> None:
    generator = np.random.default_rng(2)
    x, y = generator.standard_normal((6, 9)), generator.standard_normal((40, 9)) + 1
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()  # b a and b^1/2 a b^1/2 have the same eigenvalues
    expected = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + np.trace(a) + np.trace(b) - 2 * cross
    np.testing.assert_allclose(distances.frechet(x, y), [expected])


def test_frechet_with_many_features_takes_no_square_matrix_of_them() -> None:
    """Features that are all zero change nothing, and 40,000 of them would need matrices of 13 GB."""
    x, y = np.random.default_rng(7).standard_normal((2, 12, 5))
    padded = [np.pad(part, ((0, 0), (0, 40_000))) for part in (x, y)]
    np.testing.assert_allclose(distances.frechet(*padded), distances.frechet(x, y))


def test_a_count_of_zero_leaves_an_image_out_and_two_repeat_it() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.standard_normal((8, 3)), generator.standard_normal((20, 3))
    counts = np.array([[1, 1, 0, 1, 0, 1, 1, 1], [2, 1, 0, 1, 0, 1, 1, 2]])
    parts = [x[[0, 1, 3, 5, 6, 7]], x[[0, 0, 1, 3, 5, 6, 7, 7]]]
    np.testing.assert_allclose(distances.frechet(x, y, counts), [distances.frechet(part, y)[0] for part in parts])
    np.testing.assert_allclose(distances.kid(x, y, counts)[0], distances.kid(parts[0], y)[0])


def test_kid_is_the_unbiased_estimate() -> None:
    generator = np.random.default_rng(4)
    x, y = generator.standard_normal((7, 5)), generator.standard_normal((11, 5)) + 0.3
    of_x, of_y, both = (polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (of_x, of_y)]
    np.testing.assert_allclose(distances.kid(x, y), [sum(within) - 2 * both.mean()])


def test_kid_of_equal_distributions_is_zero_on_average() -> None:
    generator = np.random.default_rng(5)
    values = [distances.kid(*generator.standard_normal((2, 20, 4)))[0] for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


def test_kid_of_many_images_is_the_mean_over_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(6).standard_normal((2, 12, 3))
    monkeypatch.setattr(distances, "KID_SUBSET", 6)
    expected = (distances.kid(x[:6], y[:6]) + distances.kid(x[6:], y[6:])) / 2
    np.testing.assert_allclose(distances.kid(x, y), expected)


def test_neighbours_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With k = 1: y at 0, 1, 3 and 10 has the radii 1, 1, 2 and 7; x at 0.5, 4.5 and 30 has 4, 4 and 25.5."""
    monkeypatch.setattr(distances, "PRECISION_NEIGHBOURS", 1)
    monkeypatch.setattr(distances, "DENSITY_NEIGHBOURS", 1)
    monkeypatch.setattr(distances, "ROWS", 2)  # in two parts
    x, y = np.array([[0.5], [4.5], [30]]), np.array([[0.0], [1], [3], [10]])
    found = distances.neighbours(x, y)
    np.testing.assert_array_equal(found.precision, [1, 1, 0])
    np.testing.assert_array_equal(found.recall, [1])  # 10 is within 25.5 of 30
    np.testing.assert_array_equal(found.density, [2, 2, 0])  # 4.5 is within 2 of 3 and within 7 of 10
    np.testing.assert_array_equal(found.coverage, [1])
    subsets = distances.neighbours(x, y, np.array([[1, 0, 1], [0, 2, 0], [0, 0, 1]]))
    np.testing.assert_array_equal(subsets.coverage, [0.5, 0.5, 0])  # 0 and 1; 3 and 10
    np.testing.assert_array_equal(subsets.recall, [1, 0.5, 0.25])  # all; 1 and 3; 10


def test_neighbours_by_their_definition() -> None:
    """Kynkäänniemi et al. 2019, eq. 2, with k = 3; Naeem et al. 2020, eqs. 3 and 4, with k = 5."""
    generator = np.random.default_rng(7)
    x, y = generator.standard_normal((40, 2)), generator.standard_normal((60, 2)) * 0.7 + 0.4
    between = euclidean_distances(x, y)

    def radius(values: np.ndarray, k: int) -> np.ndarray:
        return np.sort(euclidean_distances(values), axis=1)[:, k]  # 0 is itself

    found = distances.neighbours(x, y)
    np.testing.assert_array_equal(found.precision, (between <= radius(y, 3)).any(axis=1))
    np.testing.assert_allclose(found.recall, (radius(x, 3) >= between.T).any(axis=1).mean())
    np.testing.assert_array_equal(found.density, (between <= radius(y, 5)).sum(axis=1) / 5)
    np.testing.assert_allclose(found.coverage, (between.min(axis=0) <= radius(y, 5)).mean())
    assert 0 < found.precision.mean() < 1
    assert 0 < found.recall.mean() < 1
    assert 0 < found.coverage.mean() < 1


def test_a_set_has_a_density_of_one_among_its_like() -> None:
    x, y = np.random.default_rng(8).standard_normal((2, 500, 3))
    assert distances.neighbours(x, y).density.mean() == pytest.approx(1, abs=0.1)
