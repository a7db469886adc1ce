"""Families of data on which recall must hold.

Each family is a function of a seeded generator. The arrays are the same on every CPU: they are made of sums and products of
single elements in a fixed order, of square roots and of roundings. No BLAS, no logarithm and no sine takes part.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Random = np.random.Generator
Pair = tuple[Doubles, Doubles]

ROWS, QUERIES = 3000, 200


@dataclass(frozen=True, slots=True)
class Family:
    """Vectors of one kind, and queries for them. An id is a row of `base`."""

    name: str
    metric: str
    base: Floats = field(repr=False)
    queries: Floats = field(repr=False)
    M: int = 16
    ef_construction: int = 200

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.base.shape[1]


@dataclass(frozen=True, slots=True)
class _Recipe:
    metric: str
    make: Callable[[Random], Pair]
    seed: str


_RECIPES: dict[str, _Recipe] = {}


def _family(
    name: str, metric: str = "l2", seed: str | None = None
) -> Callable[[Callable[[Random], Pair]], Callable[[Random], Pair]]:
    """Registers a recipe. Families with the same `seed` begin with the same random numbers."""

    def register(make: Callable[[Random], Pair]) -> Callable[[Random], Pair]:
        _RECIPES[name] = _Recipe(metric, make, seed or name)
        return make

    return register


def names(pattern: str = "*") -> list[str]:
    """The names of all families that a pattern with `*` and `?` fits; several patterns are separated by commas."""
    return [name for name in _RECIPES if any(fnmatchcase(name, one) for one in pattern.split(","))]


def make(name: str) -> Family:
    """Makes a family's data."""
    recipe = _RECIPES[name]
    base, queries = recipe.make(np.random.default_rng(zlib.crc32(recipe.seed.encode())))
    return Family(name, recipe.metric, base.astype(np.float32), queries.astype(np.float32))


def make_all(pattern: str = "*") -> Iterator[Family]:
    """Makes the data of all families that the pattern fits, one after the other."""
    return (make(name) for name in names(pattern))


# ---- arithmetic that is the same everywhere ----


def product(a: Doubles, b: Doubles) -> Doubles:
    """a @ b, added up in the order of the inner dimension."""
    out = np.zeros((len(a), b.shape[1]))
    for column, row in zip(a.T, b, strict=True):
        out += column[:, np.newaxis] * row
    return out


def unit(rows: Doubles) -> Doubles:
    """Rows of length 1."""
    squares = np.zeros(len(rows))
    for column in rows.T:
        squares += column * column
    return rows / np.sqrt(squares)[:, np.newaxis]


def normal(random: Random, dim: int, rows: int = ROWS, queries: int = QUERIES) -> Pair:
    """Standard normal vectors."""
    return random.standard_normal((rows, dim)), random.standard_normal((queries, dim))


def around(random: Random, centres: Doubles, radius: float, rows: int = ROWS, queries: int = QUERIES) -> Pair:
    """Normal clouds of one radius around centres that are drawn evenly."""

    def some(n: int) -> Doubles:
        picked = centres[random.integers(0, len(centres), n)]
        return picked + radius * random.standard_normal(picked.shape)

    return some(rows), some(queries)


def spread(random: Random, n: int, low: float, octaves: int) -> Doubles:
    """Numbers from `low` to `low * 2^octaves`, as many in each octave."""
    return low * np.ldexp(1 + random.random(n), random.integers(0, octaves, n))


# ---- tight clusters ----


@_family("towns-2d")
def _(random: Random) -> Pair:
    towns = np.column_stack([random.uniform(-60, 60, 200), random.uniform(-180, 180, 200)])
    return around(random, towns, 1e-3, 5000)


def _clusters(dim: int) -> Callable[[Random], Pair]:
    return lambda random: around(random, random.standard_normal((100, dim)), 1e-4)


for _dim in (16, 32, 64):
    _family(f"clusters-{_dim}d")(_clusters(_dim))


@_family("earth-3d")
def _(random: Random) -> Pair:
    """Metres from the Earth's centre: 300 towns of some kilometres."""
    return around(random, 6.371e6 * unit(random.standard_normal((300, 3))), 2e3)


@_family("two-scales-32d")
def _(random: Random) -> Pair:
    """Wide clusters, in each of which half of the rows are in tight ones."""
    wide = 4 * random.standard_normal((20, 32))
    tight, _ = around(random, wide, 1.0, 100, 0)
    base_wide, queries_wide = around(random, wide, 1.0, ROWS // 2, QUERIES // 2)
    base_tight, queries_tight = around(random, tight, 1e-3, ROWS // 2, QUERIES // 2)
    order = random.permutation(ROWS)
    return np.concatenate([base_wide, base_tight])[order], np.concatenate([queries_wide, queries_tight])


@_family("duplicates-32d")
def _(random: Random) -> Pair:
    """Every row 10 to 50 times; half of the queries are rows."""
    distinct, queries = normal(random, 32, 100)
    rows = np.repeat(np.arange(100), random.integers(10, 51, 100))
    queries[::2] = distinct[random.integers(0, 100, len(queries[::2]))]
    return distinct[random.permutation(rows)], queries


@_family("near-duplicates-32d")
def _(random: Random) -> Pair:
    return around(random, random.standard_normal((200, 32)), 1e-6)


@_family("one-point-8d")
def _(random: Random) -> Pair:
    """Every row is the same."""
    return np.full((1000, 8), 0.3), random.standard_normal((QUERIES, 8))


# ---- inner products ----


def _scaled_queries(factor: float) -> Callable[[Random], Pair]:
    def make_scaled(random: Random) -> Pair:
        base, queries = normal(random, 64)
        return base, queries * factor

    return make_scaled


for _factor in (1, 0.3, 0.1, 0.01, 100):
    _family(f"ip-queries-x{_factor:g}-64d", "ip", seed="ip-queries")(_scaled_queries(_factor))


@_family("ip-norms-100x-64d", "ip")
def _(random: Random) -> Pair:
    base, queries = normal(random, 64)
    return unit(base) * spread(random, ROWS, 1, 7)[:, np.newaxis], queries


@_family("ip-large-items-64d", "ip")
def _(random: Random) -> Pair:
    """Items and users of a factorisation: items are 1,000 times as long, and some are popular."""
    taste = random.standard_normal((16, 64))
    items = product(random.standard_normal((ROWS, 16)), taste) * spread(random, ROWS, 2, 3)[:, np.newaxis]
    return items, 1e-2 * product(random.standard_normal((QUERIES, 16)), taste)


def _offset_rows(offset: float) -> Callable[[Random], Pair]:
    """All rows lie on one side of the origin; queries do not."""

    def make_offset(random: Random) -> Pair:
        base, queries = normal(random, 64)
        return base + offset, queries

    return make_offset


for _offset in (1, 3):
    _family(f"ip-offset-{_offset:g}-64d", "ip", seed="ip-offset")(_offset_rows(_offset))


@_family("ip-offset-both-64d", "ip")
def _(random: Random) -> Pair:
    base, queries = normal(random, 64)
    return base + 3, queries + 3


@_family("ip-clusters-32d", "ip")
def _(random: Random) -> Pair:
    return around(random, random.standard_normal((100, 32)), 1e-2)


# ---- embeddings and cosine ----


@_family("embeddings-384d", "cosine")
def _(random: Random) -> Pair:
    """Few directions that count, fewer and fewer the further down; topics; a common direction; a little noise."""
    axes = 60
    strength = 1 / np.sqrt(1 + np.arange(axes) / 4)
    topics = random.standard_normal((150, axes)) * strength
    latent_base, latent_queries = around(random, topics, 0)
    directions = random.standard_normal((axes, 384))
    common = 3 * random.standard_normal(384)

    def embed(latent: Doubles) -> Doubles:
        own = latent + 1.5 * random.standard_normal(latent.shape) * strength
        return unit(product(own, directions) + common + 1.5 * random.standard_normal((len(latent), 384)))

    return embed(latent_base).astype(np.float16).astype(np.float64), embed(latent_queries)


@_family("sparse-1024d", "cosine")
def _(random: Random) -> Pair:
    """1 of 100 components is not 0."""

    def some(n: int) -> Doubles:
        rows = np.zeros((n, 1024))
        for row in rows:
            there = random.choice(1024, random.integers(6, 15), replace=False)
            row[there] = 0.2 + random.random(len(there))
        return rows

    return some(2000), some(100)


@_family("cosine-lengths-64d", "cosine")
def _(random: Random) -> Pair:
    """Lengths from 1e-3 to 1e3."""
    base, queries = normal(random, 64)
    return (
        base * spread(random, ROWS, 1e-3, 20)[:, np.newaxis],
        queries * spread(random, QUERIES, 1e-3, 20)[:, np.newaxis],
    )


def _cone(width: float) -> Callable[[Random], Pair]:
    def make_cone(random: Random) -> Pair:
        axis = unit(random.standard_normal((1, 32)))
        base, queries = normal(random, 32)
        return unit(axis + width * unit(base)), unit(axis + width * unit(queries))

    return make_cone


for _width in (1e-2, 1e-3):
    _family(f"cosine-cone-{_width:g}-32d", "cosine")(_cone(_width))


@_family("cosine-clusters-32d", "cosine")
def _(random: Random) -> Pair:
    return around(random, unit(random.standard_normal((100, 32))), 3e-3)


# ---- few values ----


@_family("one-hot-200d")
def _(random: Random) -> Pair:
    hot = np.eye(200)
    return hot[random.integers(0, 200, ROWS)], hot[random.integers(0, 200, QUERIES)]


@_family("few-hot-200d", "cosine")
def _(random: Random) -> Pair:
    """3 to 6 ones."""

    def some(n: int) -> Doubles:
        rows = np.zeros((n, 200))
        for row in rows:
            row[random.choice(200, random.integers(3, 7), replace=False)] = 1
        return rows

    return some(ROWS), some(QUERIES)


@_family("binary-256d")
def _(random: Random) -> Pair:
    """0 and 1: patterns, of which 1 of 7 bits is turned."""
    patterns = random.random((100, 256)) < 0.5

    def some(n: int) -> Doubles:
        return (patterns[random.integers(0, 100, n)] ^ (random.random((n, 256)) < 0.15)).astype(np.float64)

    return some(ROWS), some(QUERIES)


@_family("int8-128d")
def _(random: Random) -> Pair:
    base, queries = around(random, 40 * random.standard_normal((100, 128)), 20.0)
    return np.clip(np.rint(base), -128, 127), np.clip(np.rint(queries), -128, 127)


@_family("uint8-histograms-128d")
def _(random: Random) -> Pair:
    """Counts, most of them small and some large, as descriptors of pictures have."""
    base, queries = around(random, 5 * np.abs(random.standard_normal((100, 128))), 4.0)
    return np.clip(np.rint(base * np.abs(base)), 0, 255), np.clip(np.rint(queries * np.abs(queries)), 0, 255)


@_family("lattice-3d")
def _(random: Random) -> Pair:
    """Whole numbers: most distances are tied."""
    return random.integers(0, 16, (ROWS, 3)).astype(float), random.integers(0, 16, (QUERIES, 3)).astype(float)


# ---- scales, offsets, tails ----


@_family("outliers-32d")
def _(random: Random) -> Pair:
    """Seven rows are 1e3 to 1e6 times as far as the others."""
    base, queries = normal(random, 32)
    base[random.choice(ROWS, 7, replace=False)] *= np.array([1e3, 1e3, 1e4, 1e4, 1e5, 1e6, 1e6])[:, np.newaxis]
    return base, queries


def _series(offset: float) -> Callable[[Random], Pair]:
    def make_series(random: Random) -> Pair:
        base, queries = normal(random, 128)
        return np.cumsum(base, axis=1) / 8 + offset, np.cumsum(queries, axis=1) / 8 + offset

    return make_series


for _offset in (1e3, 1e4):
    _family(f"series-offset-{_offset:g}-128d", seed="series")(_series(_offset))


@_family("mixed-scales-64d")
def _(random: Random) -> Pair:
    """Components from 1e-3 to 1e3."""
    base, queries = normal(random, 64)
    scales = np.ldexp(1.0, random.permutation(64) // 3 - 10)
    return base * scales, queries * scales


@_family("heavy-tailed-32d")
def _(random: Random) -> Pair:
    """Student's t with 2 degrees of freedom, each component by itself."""
    base, queries = normal(random, 32)

    def tails(shape: tuple[int, ...]) -> Doubles:
        a, b = random.standard_normal(shape), random.standard_normal(shape)
        return np.sqrt((a * a + b * b) / 2)

    return base / tails(base.shape), queries / tails(queries.shape)


@_family("low-rank-256d")
def _(random: Random) -> Pair:
    directions = random.standard_normal((6, 256))
    base, queries = normal(random, 6)
    return product(base, directions), product(queries, directions)


@_family("constant-components-64d")
def _(random: Random) -> Pair:
    """All but eight components are the same in every row."""
    base, queries = normal(random, 8)
    rest = 10 * random.standard_normal(56)

    def filled(rows: Doubles) -> Doubles:
        return np.concatenate([rows, np.broadcast_to(rest, (len(rows), 56))], axis=1)

    return filled(base), filled(queries)


@_family("sphere-16d")
def _(random: Random) -> Pair:
    base, queries = normal(random, 16)
    return unit(base), unit(queries)


@_family("queries-elsewhere-32d")
def _(random: Random) -> Pair:
    """Queries do not come from where the rows are."""
    base, queries = normal(random, 32)
    return base, 0.5 * queries + 3


# ---- dimensions ----


def _normal(dim: int, rows: int, queries: int) -> Callable[[Random], Pair]:
    return lambda random: normal(random, dim, rows, queries)


for _dim in (1, 2, 3, 7, 63, 65):
    _family(f"normal-{_dim}d")(_normal(_dim, ROWS, QUERIES))


@_family("normal-1536d")
def _(random: Random) -> Pair:
    """In clusters: rows that are all as far from each other have no nearest to be found."""
    return around(random, random.standard_normal((100, 1536)), 0.7, 1500, 100)
