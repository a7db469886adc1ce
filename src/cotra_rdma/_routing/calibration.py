"""The calibration of Compass: the weights of its models, and what each threshold loses."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from cotra_rdma._core.arrays import Floats
from cotra_rdma._core.constants import METRICS
from cotra_rdma.errors import FormatError

CALIBRATION_K = 10
N_LIST_FEATURES, N_SHARD_FEATURES = 11, 7
_ALL_SHARE = 0.8  # of the shards: if more would be asked on average, all are asked


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a build learned about a collection. It is valid for the coarse tables of that build only.

    Attributes:
        metric: the metric of the collection.
        n_shards: the number of shards.
        n_lists: the number of lists of all coarse tables together.
        dim: the components of a vector.
        k: the number of neighbours that recall was measured on.
        n_held_out: the number of vectors that recall was measured with.
        directions: the directions in which the lists are widest, as base64 of float16[n, dim].
        list_caps: the largest z and d^2 that the model was fitted to. Larger ones count as these.
        list_weights: the weights of the first model's features.
        shard_weights: the weights of the second model's features.
        shard_offsets: the offset of each shard.
        shard_slopes: the slope of each shard.
        thresholds: thresholds on a shard's share, ascending.
        recalls: for each threshold, the recall of the held-out vectors against asking all shards, less one standard
            error.
        shards: for each threshold, the mean number of shards asked.

    Raises:
        FormatError: a value is out of its range, or values do not fit each other.
    """

    metric: str
    n_shards: int
    n_lists: int
    dim: int
    k: int
    n_held_out: int
    directions: str
    list_caps: tuple[float, ...]
    list_weights: tuple[float, ...]
    shard_weights: tuple[float, ...]
    shard_offsets: tuple[float, ...]
    shard_slopes: tuple[float, ...]
    thresholds: tuple[float, ...]
    recalls: tuple[float, ...]
    shards: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (self.n_shards, self.n_lists, self.dim, self.k, self.n_held_out)
        if self.metric not in METRICS or not all(type(n) is int and n > 0 for n in numbers):
            raise FormatError("calibration: the metric is unknown, or a number is not a positive integer")
        lengths = {"list_caps": 2, "list_weights": N_LIST_FEATURES, "shard_weights": N_SHARD_FEATURES}
        lengths |= {"shard_offsets": self.n_shards, "shard_slopes": self.n_shards}
        lengths |= dict.fromkeys(("thresholds", "recalls", "shards"), len(self.thresholds))
        for name, length in lengths.items():
            values = getattr(self, name)
            if len(values) != length or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                raise FormatError(f"calibration: {name} must be {length} finite numbers")
        if not self.thresholds or list(self.thresholds) != sorted(self.thresholds) or self.thresholds[0] <= 0:
            raise FormatError("calibration: thresholds must be positive and ascend")
        if list(self.recalls) != sorted(self.recalls, reverse=True):
            raise FormatError("calibration: recalls must not ascend")
        self.axes()

    def axes(self) -> Floats:
        """Decodes `directions` to float32[n, dim].

        Raises:
            FormatError: the directions are malformed.
        """
        try:
            flat = np.frombuffer(base64.b64decode(self.directions, validate=True), "<f2").astype(np.float32)
        except (binascii.Error, ValueError, TypeError) as error:
            raise FormatError(f"calibration: directions are not base64: {error}") from error
        if len(flat) % self.dim or not (np.abs(flat) <= 2).all():
            raise FormatError(f"calibration: directions of {len(flat)} numbers do not fit dimension {self.dim}")
        return flat.reshape(-1, self.dim)

    def threshold(self, target_recall: float) -> float | None:
        """Returns the share below which a shard is left out.

        Returns None if all shards have to be asked: leaving some out would lose more than the target allows, or save
        little.
        """
        recalls, shards = np.asarray(self.recalls)[::-1], np.asarray(self.shards)[::-1]
        if target_recall > recalls[-1] or target_recall >= 1:
            return None
        if np.interp(target_recall, recalls, shards) > _ALL_SHARE * self.n_shards:
            return None
        # Both arrays are reversed, because the recall falls as the threshold grows.
        return float(np.exp(np.interp(target_recall, recalls, np.log(np.asarray(self.thresholds)[::-1]))))

    def expected(self, target_recall: float) -> float:
        """Returns the mean number of shards that a held-out vector asks at a target."""
        if self.threshold(target_recall) is None:
            return float(self.n_shards)
        return float(np.interp(target_recall, self.recalls[::-1], self.shards[::-1]))

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as values that JSON knows."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """Reads what `to_json` made.

        Raises:
            FormatError: the value is anything else.
        """
        if not isinstance(raw, dict):
            raise FormatError("calibration: must be an object")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
        try:
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise FormatError(f"calibration: {error}") from error
