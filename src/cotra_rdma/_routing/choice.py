"""Fits conditional logit models (McFadden 1974, "Conditional logit analysis of qualitative choice behavior")."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.arrays import Floats, Wide
from cotra_rdma._core.exact import exp, log, long_products, solve
from cotra_rdma._routing.model import weighted_sum

_NEWTON_STEPS = 25
_RIDGE = 1e-5  # times the number of choices
_OWN_RIDGE = 3.0


def fit_choice(features: Floats, counts: Floats, *, own: bool = False) -> tuple[Wide, Wide, Wide]:
    """Fits a conditional logit model.

    Args:
        features: the features of each alternative, float32[n, alternatives, f].
        counts: how often each alternative was chosen, float32[n, alternatives].
        own: whether each alternative gets an offset and a slope on the first feature of its own.

    Returns:
        The weights of the features, float64[f]. The offsets and the slopes, float64[alternatives] each, which are empty
        without `own`.
    """
    likelihood = _Likelihood(features, counts, own)
    weights = _maximum(likelihood)
    scale, centre = likelihood.scale, likelihood.centre
    slope = weights[likelihood.slopes] / scale[0]
    return weights[: len(scale)] / scale, weights[likelihood.offsets] - slope * centre[0], slope


def _maximum(likelihood: _Likelihood) -> Wide:
    """Maximises a likelihood by damped Newton steps. The likelihood is concave."""
    weights = np.zeros(len(likelihood.ridge))
    value, chances = likelihood.at(weights)
    for _ in range(_NEWTON_STEPS):
        step = solve(likelihood.hessian(chances), likelihood.gradient(weights, chances))
        size = 1.0
        while size > 1e-3:
            new_value, new_chances = likelihood.at(weights + size * step)
            if new_value > value:
                break
            size /= 2
        else:
            break
        gain, value, chances, weights = new_value - value, new_value, new_chances, weights + size * step
        if gain < 1e-6:
            break
    return weights


class _Likelihood:
    """The likelihood of a conditional logit model, as a function of its weights.

    The weights are those of the f features, and with `own` an offset and a slope for each alternative.

    Attributes:
        scale: what each feature was divided by, float64[f].
        centre: what was subtracted from each feature before, float64[f].
        offsets: where the offsets are among the weights.
        slopes: where the slopes are among the weights.
        ridge: the penalty on the square of each weight.
    """

    def __init__(self, features: Floats, counts: Floats, own: bool) -> None:
        n, alternatives, f = features.shape
        flat = features.reshape(-1, f)
        self.scale = np.maximum(flat.std(axis=0, dtype=np.float64), 1e-6)
        self.centre = flat.mean(axis=0, dtype=np.float64)
        flat = ((flat - self.centre) / self.scale).astype(np.float32)
        self._cube = flat.reshape(n, alternatives, f)
        self._columns = flat.T.astype(np.float64, order="C")
        self._first, self._own, self._f = self._cube[:, :, 0], own, f
        self._chosen = counts.sum(axis=1, dtype=np.float64)
        self._total = float(self._chosen.sum())
        groups = alternatives if own else 0
        self.ridge = np.concatenate([np.full(f, _RIDGE * self._total), np.full(2 * groups, _OWN_RIDGE)])
        self.offsets, self.slopes = slice(f, f + groups), slice(f + groups, f + 2 * groups)
        self._wanted = self._sums(counts)

    def _sums(self, mass: Floats) -> Wide:
        """Sums every feature times `mass`, float32[n, alternatives]. Own offsets and slopes count as features."""
        parts: list[npt.NDArray[Any]] = [(self._columns * mass.reshape(-1)).sum(axis=1)]
        if self._own:
            parts += [mass.sum(axis=0, dtype=np.float64), (mass * self._first).sum(axis=0, dtype=np.float64)]
        return np.concatenate(parts)

    def _mass(self, chances: Floats) -> Floats:
        mass: Floats = chances * self._chosen[:, np.newaxis].astype(np.float32)
        return mass

    def at(self, weights: Wide) -> tuple[float, Floats]:
        """Returns the logarithm of the likelihood for each choice, and the chances float32[n, alternatives]."""
        utility = weighted_sum(self._cube, weights[: self._f]).astype(np.float32)
        if self._own:
            utility += (weights[self.offsets] + self._first * weights[self.slopes]).astype(np.float32)
        top = utility.max(axis=1, keepdims=True)
        chances = exp(utility - top).astype(np.float32)
        norms = chances.sum(axis=1, keepdims=True)
        chances /= norms
        logs = (top + log(norms))[:, 0]
        penalty = 0.5 * (self.ridge * np.square(weights)).sum()
        parts = (self._wanted * weights).sum() - (self._chosen * logs).sum() - penalty
        return float(parts) / self._total, chances

    def gradient(self, weights: Wide, chances: Floats) -> Wide:
        """Returns the gradient, where the chances are those of the weights."""
        return self._wanted - self._sums(self._mass(chances)) - self.ridge * weights

    def hessian(self, chances: Floats) -> Wide:
        """Returns the negative of the second derivatives, where the chances are those of the weights."""
        mass, cube, first, f = self._mass(chances), self._cube, self._first, self._f
        offsets, slopes = self.offsets, self.slopes
        means = [(cube * chances[:, :, np.newaxis]).sum(axis=1, dtype=np.float64)]
        square = np.diag(self.ridge + 1e-6 * self._total)
        for number, weighed in enumerate(self._columns * mass.reshape(-1)):
            square[number, :f] += (weighed * self._columns).sum(axis=1)
        if self._own:
            means += [chances.astype(np.float64), (chances * first).astype(np.float64)]
            for block, part in ((offsets, mass), (slopes, mass * first)):
                cross = (cube * part[:, :, np.newaxis]).sum(axis=0, dtype=np.float64).T
                square[:f, block] += cross
                square[block, :f] += cross.T
            for row, column, part in (
                (offsets, offsets, mass),
                (offsets, slopes, mass * first),
                (slopes, offsets, mass * first),
            ):
                square[row, column] += np.diag(part.sum(axis=0, dtype=np.float64))
            square[slopes, slopes] += np.diag((mass * first**2).sum(axis=0, dtype=np.float64))
        joined = np.concatenate(means, axis=1)
        return np.asarray(square - long_products((joined * self._chosen[:, np.newaxis]).T, joined.T))
