"""What Compass learned of a collection at build: the models' weights, and what each threshold loses."""

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
_ALL_SHARE = 0.8  # of the shards: where more than that would be asked on average, all are


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was learned at build, for the tables of that build only.

    Attributes:
        metric, n_shards, n_lists, dim: of the collection.
        k: the neighbours that recall was measured on.
        n_held_out: the vectors that it was measured with.
        directions: base64 of float16[n, dim], in which the lists are widest.
        list_caps: the largest z and d^2 that the model has seen; larger ones count as these.
        list_weights, shard_weights: of the models' features.
        shard_offsets, shard_slopes: of each shard.
        thresholds, recalls, shards: on the held-out vectors, thresholds on a shard's share, ascending, with the recall
            (against asking all, less one standard error) and the mean number of shards asked.
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
            raise FormatError("calibration: its metric or a number is out of range")
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
        """`directions` as float32[n, dim]. Raises `FormatError`."""
        try:
            flat = np.frombuffer(base64.b64decode(self.directions, validate=True), "<f2").astype(np.float32)
        except (binascii.Error, ValueError, TypeError) as error:
            raise FormatError(f"calibration: directions: {error}") from error
        if len(flat) % self.dim or not (np.abs(flat) <= 2).all():
            raise FormatError(f"calibration: directions of {len(flat)} numbers do not fit dimension {self.dim}")
        return flat.reshape(-1, self.dim)

    def threshold(self, target_recall: float) -> float | None:
        """The share below which a shard is left out; None: ask all, since leaving any out would lose more or save little."""
        recalls, shards = np.asarray(self.recalls)[::-1], np.asarray(self.shards)[::-1]
        if target_recall > recalls[-1] or target_recall >= 1:
            return None
        if np.interp(target_recall, recalls, shards) > _ALL_SHARE * self.n_shards:
            return None
        # Between two points: the smaller threshold's recall is the larger one.
        return float(np.exp(np.interp(target_recall, recalls, np.log(np.asarray(self.thresholds)[::-1]))))

    def expected(self, target_recall: float) -> float:
        """The shards asked for a held-out vector, on average, at this target."""
        if self.threshold(target_recall) is None:
            return float(self.n_shards)
        return float(np.interp(target_recall, self.recalls[::-1], self.shards[::-1]))

    def to_json(self) -> dict[str, Any]:
        """As values that JSON knows."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """Reads what `to_json` made. Raises `FormatError` for anything else."""
        if not isinstance(raw, dict):
            raise FormatError("calibration: must be an object")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
        try:
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise FormatError(f"calibration: {error}") from error
