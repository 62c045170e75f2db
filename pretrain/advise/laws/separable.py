"""A law that is linear in some constants once a few others are fixed, fitted with all of its uncertainty.

Both the mixture law and the learning-dynamics law have the form

    y = Σ_j k_j · g_j(θ, x),      θ: one or two shape constants, k: linear constants.

For fixed θ the best k is a linear regression, so θ is searched on a grid and k solved in closed form (variable
projection, Golub and Pereyra 1973). Every grid point keeps a weight, its likelihood RSS^(-df/2) under a flat prior,
and a prediction is the mixture of the Student distributions of the grid points. Nothing is linearised in θ, so an
interval stays honest where the points do not fix θ, which is the usual case for a few short runs. Outliers are
weighted down (Huber).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

HUBER = 1.5  # standard deviations; further points are weighted down
WITHIN = 0.8664  # of normal noise: what the weights leave of its variance
NOISE_FLOOR = 1e-7  # nats; float32 losses are not more exact
WEIGHTLESS = 1e-6  # relative weight below which a grid point is dropped

Basis = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(θ: [grid, shapes], points: [n, coordinates]) → [grid, n, linear constants]."""


@dataclass(frozen=True)
class Separable:
    """A fitted law.

    Attributes:
        basis: the law's functions g.
        theta: shape constants of each grid point, [grid, shapes].
        linear: the linear constants of each grid point, [grid, constants].
        covariance: their covariance in units of the noise variance, [grid, constants, constants].
        noise: standard deviation of a measurement at each grid point, [grid].
        weights: weight of each grid point, sums to 1, [grid].
        freedom: degrees of freedom left by the fit, of independent points.
        residual: root mean square of y minus the best grid point's law, outliers weighted down, in units of y.
        extra: standard deviation added to each prediction, for an error that the fitted points cannot show.
    """

    basis: Basis
    theta: np.ndarray
    linear: np.ndarray
    covariance: np.ndarray
    noise: np.ndarray
    weights: np.ndarray
    freedom: float
    residual: float
    extra: float = 0.0

    @property
    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Shape constants and linear constants of the most likely grid point."""
        top = int(np.argmax(self.weights))
        return self.theta[top], self.linear[top]

    def predict(self, points: np.ndarray, level: float = 0.8) -> np.ndarray:
        """Return median, low and high of a new measurement at each of `points` ([n, coordinates]) as [3, n]."""
        from scipy.special import stdtr

        g, mean = self._means(points)
        spread = ((g @ self.covariance) * g).sum(-1).clip(0)
        scale = np.sqrt(self.noise[:, None] ** 2 * (1 + spread) + self.extra**2)
        low, high = (mean - 100 * scale).min(0), (mean + 100 * scale).max(0)
        found = []
        for q in (0.5, (1 - level) / 2, (1 + level) / 2):
            a, b = low.copy(), high.copy()
            for _ in range(44):
                middle = (a + b) / 2
                below = self.weights @ stdtr(self.freedom, (middle - mean) / scale) < q
                a, b = np.where(below, middle, a), np.where(below, b, middle)
            found.append((a + b) / 2)
        return np.stack(found)

    def curve(self, points: np.ndarray) -> np.ndarray:
        """Return the mean of the law at each of `points`, [n]."""
        return self.weights @ self._means(points)[1]

    def _means(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the functions g ([grid, n, constants]) and the law ([grid, n]) of each grid point."""
        g = self.basis(self.theta, points)
        return g, (g @ self.linear[..., None])[..., 0]

    def draws(self, points: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
        """Return `count` curves of the law itself (without the noise of a measurement) at `points`, [count, n]."""
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(self.weights), count, p=self.weights)
        values, vectors = np.linalg.eigh(self.covariance[chosen])
        normal = rng.standard_normal((count, self.linear.shape[1])) * np.sqrt(values.clip(0))
        student = np.sqrt(self.freedom / rng.chisquare(self.freedom, count))
        step = np.einsum("cpq,cq->cp", vectors, normal) * (self.noise[chosen] * student)[:, None]
        g = self.basis(self.theta[chosen], points)
        return np.einsum("cnp,cp->cn", g, self.linear[chosen] + step)


def fit(
    basis: Basis,
    points: np.ndarray,
    y: np.ndarray,
    bounds: list[tuple[float, float]],
    resolution: int,
    subsets: list[list[int]],
    positive: list[int],
    repeats: float = 1.0,
) -> Separable:
    """Fit a law of this form.

    Args:
        points: [n, coordinates]; y: [n].
        bounds: range of each shape constant; each has `resolution` grid values.
        subsets: the sets of linear constants that may differ from zero: the full law, and then its borders where a
            constant named in `positive` is 0, which serve the grid points where the sets before give a negative one. The
            last set must serve any.
        positive: linear constants that must not be negative.
        repeats: points that say the same thing as one: above 1 where the errors of neighbours are alike.
    """
    order = np.lexsort(
        (*points.T, y)
    )  # so that the result, to the last bit, does not depend on the order of the points
    points, y = points[order], y[order]
    robust = np.ones_like(y)
    for turn in range(6):  # three rounds of outlier weights on the first grid, three that refine it
        axes = [np.linspace(low, high, resolution) for low, high in bounds]
        theta = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(bounds))
        fitted = _fit_grid(basis, theta, points, y, robust, subsets, positive, repeats)
        theta0, linear0 = fitted.best
        error = y - (basis(theta0[None], points)[0] @ linear0)
        typical = max(
            1.4826 * float(np.median(np.abs(error))) * np.sqrt(y.size / fitted.freedom / repeats), NOISE_FLOOR
        )
        robust = np.minimum(1.0, HUBER * typical / np.abs(error).clip(1e-300))
        if turn >= 2:
            bounds = [
                (max(low, float(alive.min() - axis[1] + axis[0])), min(high, float(alive.max() + axis[1] - axis[0])))
                for (low, high), alive, axis in zip(bounds, fitted.theta.T, axes, strict=True)
            ]
    return fitted


def _fit_grid(
    basis: Basis,
    theta: np.ndarray,
    points: np.ndarray,
    y: np.ndarray,
    robust: np.ndarray,
    subsets: list[list[int]],
    positive: list[int],
    repeats: float,
) -> Separable:
    """Solve the linear constants of every grid point and weigh them."""
    n, parts = y.size, []
    for subset in subsets:
        g = basis(theta, points)
        g[..., [i for i in range(g.shape[2]) if i not in subset]] = 0
        weighted = (g * robust[:, None]).transpose(0, 2, 1)
        inverse = np.linalg.pinv(weighted @ g, rcond=1e-13, hermitian=True)
        linear = (inverse @ (weighted @ y)[..., None])[..., 0]
        rss = (y - (g @ linear[..., None])[..., 0]) ** 2 @ robust + n * NOISE_FLOOR**2
        allowed = (linear[:, positive] >= 0).all(1)
        parts.append((theta[allowed], linear[allowed], inverse[allowed], rss[allowed]))
        theta = theta[~allowed]
    freedom = max(1.0, (n - g.shape[2] - theta.shape[1]) / repeats)
    theta, linear, inverse, rss = (np.concatenate(column) for column in zip(*parts, strict=True))
    weights = (rss / rss.min()) ** (-freedom / 2)
    kept = weights > WEIGHTLESS
    weights = weights[kept] / weights[kept].sum()
    best = float(np.sqrt(rss.min() / n))
    return Separable(
        basis, theta[kept], linear[kept], inverse[kept], np.sqrt(rss[kept] / freedom / WITHIN), weights, freedom, best
    )
