"""Kernels: every SIMD level that this CPU has, against numpy and against the portable one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma import InvalidInputError
from cotra_rdma._native.library import check, ffi, lib, new_error
from helpers.image import GuardedMemory, checksum
from helpers.properties import fixed

PORTABLE = lib.COTRA_SIMD_PORTABLE
METRICS = {"l2": lib.COTRA_METRIC_L2, "ip": lib.COTRA_METRIC_IP, "cosine": lib.COTRA_METRIC_COSINE}
TYPES = {
    np.float32: lib.COTRA_VECTOR_F32,
    np.float16: lib.COTRA_VECTOR_F16,
    np.uint8: lib.COTRA_VECTOR_U8,
}
DIMS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 1000, 4095, 4096)
TOLERANCE = 1e-5  # of (|q| + |x|)^2, as csrc/kernels/kernels.h promises


def has(simd: int) -> bool:
    out = ffi.new("float *")
    zeros = ffi.new("float[32]")
    return bool(lib.cotra_kernel_distance(simd, 0, 0, zeros, zeros, 1, out, ffi.NULL) == 0)


LEVELS = [simd for simd in range(4) if has(simd)]


def named(simd: int) -> str:
    return str(ffi.string(lib.cotra_simd_name(simd)).decode())


levels = pytest.mark.parametrize("simd", LEVELS, ids=named)


def padded(vector: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(vector, (0, -len(vector) % multiple))


def distance(simd: int, metric: str, query: np.ndarray, vector: np.ndarray) -> np.float32:
    return distance_in_place(simd, metric, len(query), padded(query, 32), padded(vector, 32 // vector.itemsize))


def distance_in_place(simd: int, metric: str, dim: int, query: np.ndarray, vector: np.ndarray) -> np.float32:
    out, err = ffi.new("float *"), new_error()
    status = lib.cotra_kernel_distance(
        simd,
        METRICS[metric],
        TYPES[vector.dtype.type],
        ffi.from_buffer("float[]", query),
        ffi.from_buffer(vector),
        dim,
        out,
        err,
    )
    check(status, err)
    return np.float32(out[0])


def exact(metric: str, query: np.ndarray, vector: np.ndarray) -> tuple[float, float]:
    """The distance in float64, and the tolerance."""
    q, x = query.astype(np.float64), vector.astype(np.float64)
    scale = (np.linalg.norm(q) + np.linalg.norm(x)) ** 2
    return float(((q - x) ** 2).sum() if metric == "l2" else 1 - q @ x), TOLERANCE * scale + 1e-7


def random_vector(generator: np.random.Generator, dim: int, kind: type) -> np.ndarray:
    if kind is np.uint8:
        return generator.integers(0, 256, dim, np.uint8)
    return generator.normal(size=dim).astype(kind)


def scan(simd: int, table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    sums, err = np.full(32, 0xFFFFFFFF, np.uint32), new_error()
    lut, packed = ffi.from_buffer("uint8_t[]", table), ffi.from_buffer("uint8_t[]", codes)
    check(lib.cotra_kernel_scan(simd, lut, packed, 4 * len(table), ffi.from_buffer("uint32_t[]", sums), err), err)
    return sums


def scan_by_hand(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """table uint8[groups, 16], codes uint8[groups, 16]: neighbour j's nibble is low in byte j, neighbour j + 16's high."""
    nibbles = np.concatenate([codes & 15, codes >> 4], axis=1)
    return np.take_along_axis(table, nibbles.astype(np.intp), axis=1).sum(axis=0, dtype=np.uint32)


def test_the_best_level_is_one_of_them() -> None:
    assert PORTABLE in LEVELS
    assert lib.cotra_simd_best() == max(LEVELS)
    assert [named(simd) for simd in (0, 1, 2, 3, -1)] == ["portable", "avx2", "avx512", "unknown", "unknown"]


@levels
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_numpys(simd: int, metric: str, kind: type) -> None:
    generator = np.random.default_rng(0)
    for dim in DIMS:
        for _ in range(5):
            query = generator.normal(scale=100 if kind is np.uint8 else 1, size=dim).astype(np.float32)
            vector = random_vector(generator, dim, kind)
            expected, tolerance = exact(metric, query, vector)
            assert distance(simd, metric, query, vector) == pytest.approx(expected, abs=tolerance)


@levels
@pytest.mark.parametrize("metric", METRICS)
@fixed(60)
@given(data=st.data())
def test_any_values(simd: int, metric: str, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(TYPES)))
    dim = data.draw(st.integers(1, 130))
    width = {np.float32: 32, np.float16: 16, np.uint8: 32}[kind]
    bound = 2.0**14
    component = st.integers(0, 255) if kind is np.uint8 else st.floats(-bound, bound, width=width)
    query = np.array(data.draw(st.lists(st.floats(-bound, bound, width=32), min_size=dim, max_size=dim)), np.float32)
    vector = np.array(data.draw(st.lists(component, min_size=dim, max_size=dim)), kind)
    found = distance(simd, metric, query, vector)
    expected, tolerance = exact(metric, query, vector)
    assert abs(float(found) - expected) <= tolerance
    assert abs(float(found) - float(distance(PORTABLE, metric, query, vector))) <= tolerance


@levels
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_small_integers_are_exact_and_so_bit_identical(simd: int, kind: type) -> None:
    """Sums below 2^24 have no rounding: the order of the sums cannot show."""
    generator = np.random.default_rng(1)
    for dim in DIMS:
        query = generator.integers(0, 16, dim).astype(np.float32)
        vector = generator.integers(0, 16, dim).astype(kind)
        for metric in METRICS:
            assert distance(simd, metric, query, vector) == exact(metric, query, vector)[0]


@levels
def test_every_half_is_converted_as_numpy_does(simd: int) -> None:
    """Subnormals, zeros and infinities too; 1 - (1 x h) shows each (NaN stays NaN)."""
    one = np.ones(1, np.float32)
    zero = np.zeros(1, np.float32)
    halves = np.arange(2**16, dtype=np.uint16)[::5].view(np.float16)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        wides = halves.astype(np.float32)
        squares, differences = wides * wides, 1 - wides
    for half, square, difference in zip(halves[:, np.newaxis], squares, differences, strict=True):
        np.testing.assert_equal(distance(simd, "l2", zero, half), square)
        np.testing.assert_equal(distance(simd, "ip", one, half), difference)


@levels
@pytest.mark.parametrize("code_dim", [64, 128, 960, 1024, 1088, 2048, 4096])
def test_scan_is_exact(simd: int, code_dim: int) -> None:
    generator = np.random.default_rng(code_dim)
    for _ in range(20):
        table = generator.integers(0, 256, (code_dim // 4, 16), np.uint8)
        codes = generator.integers(0, 256, (code_dim // 4, 16), np.uint8)
        assert (scan(simd, table, codes) == scan_by_hand(table, codes)).all()


@levels
@pytest.mark.parametrize("code_dim", [64, 1024, 4096])
def test_scan_does_not_overflow(simd: int, code_dim: int) -> None:
    groups = code_dim // 4
    table = np.full((groups, 16), 255, np.uint8)
    for code in (0, 0x0F, 0xF0, 255):
        assert scan(simd, table, np.full((groups, 16), code, np.uint8)).tolist() == [255 * groups] * 32
    table[:, 1:] = 0  # only nibble 0 counts, so that neighbours side by side differ most
    codes = np.tile(np.array([0x00, 0x11, 0x01, 0x10] * 4, np.uint8), (groups, 1))
    assert (scan(simd, table, codes) == scan_by_hand(table, codes)).all()


@levels
@fixed(60)
@given(groups=st.integers(1, 5).map(lambda n: 16 * n), seed=st.integers(0, 2**32), values=st.lists(st.integers(0, 255)))
def test_scan_of_any_bytes(simd: int, groups: int, seed: int, values: list[int]) -> None:
    generator = np.random.default_rng(seed)
    table, codes = (generator.choice([0, 1, 254, 255, *values], (groups, 16)).astype(np.uint8) for _ in range(2))
    assert (scan(simd, table, codes) == scan_by_hand(table, codes)).all()


def estimate(simd: int, sums: np.ndarray, f0: np.ndarray, f1: np.ndarray, scalars: list[float]) -> tuple[bytes, int]:
    """The estimates' bits, and which are below the last of the scalars: distance, t, offset, scale, bound."""
    out, below, err = np.zeros(32, np.float32), ffi.new("uint32_t *"), new_error()
    factors = (ffi.from_buffer("float[]", each) for each in (f0, f1))
    values = ffi.from_buffer("float[]", out)
    check(
        lib.cotra_kernel_estimate(simd, ffi.from_buffer("uint32_t[]", sums), *factors, *scalars, values, below, err),
        err,
    )
    return out.tobytes(), below[0]


def aligned(keys: list[float]) -> np.ndarray:
    room = np.zeros(len(keys) + 16, np.float32)
    start = -room.ctypes.data % 64 // 4
    room[start : start + len(keys)] = keys
    return room[start : start + len(keys)]


def least(simd: int, keys: list[float]) -> int:
    place, err = ffi.new("uint32_t *"), new_error()
    check(lib.cotra_kernel_least(simd, ffi.from_buffer("float[]", aligned(keys)), len(keys), place, err), err)
    return int(place[0])


def checksum_in_c(simd: int, data: bytes | np.ndarray, seed: int) -> int:
    out, err = ffi.new("uint32_t *"), new_error()
    check(lib.cotra_kernel_checksum(simd, ffi.from_buffer(data), len(data), seed, out, err), err)
    return int(out[0])


@levels
@fixed(200)
@given(data=st.data())
def test_estimates_are_the_same_bits(simd: int, data: st.DataObject) -> None:
    numbers = st.floats(-(2.0**60), 2.0**60, width=32)
    factors = st.lists(numbers | st.sampled_from([np.inf, -np.inf, np.nan]), min_size=32, max_size=32)
    f0, f1 = (np.array(data.draw(factors), np.float32) for _ in range(2))
    sums = np.array(data.draw(st.lists(st.integers(0, 255 * 1024), min_size=32, max_size=32)), np.uint32)
    scalars = [data.draw(numbers) for _ in range(4)] + [data.draw(numbers | st.just(np.inf))]
    found, below = estimate(simd, sums, f0, f1, scalars)
    distance, t, offset, scale, bound = (np.float32(value) for value in scalars)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = distance + t * f0 - f1 * (offset + scale * sums.astype(np.float32))
    np.testing.assert_array_equal(np.frombuffer(found, np.float32), expected)
    assert below == sum(1 << j for j in range(32) if expected[j] < bound)


@levels
@fixed(100)
@given(data=st.data())
def test_weights_are_the_same_bits(simd: int, data: st.DataObject) -> None:
    numbers = st.floats(0, 2.0**60, width=32) | st.sampled_from([np.inf, -np.inf, np.nan, -1.0])
    f0, f1 = (np.array(data.draw(st.lists(numbers, min_size=32, max_size=32)), np.float32) for _ in range(2))
    spread, rounding = (np.float32(data.draw(numbers)) for _ in range(2))
    out, err = np.zeros(32, np.float32), new_error()
    check(
        lib.cotra_kernel_weigh(
            simd,
            *(ffi.from_buffer("float[]", each) for each in (f0, f1)),
            spread,
            rounding,
            ffi.from_buffer("float[]", out),
            err,
        ),
        err,
    )
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        weights = np.float32(1) / (f1 * spread + np.abs(f0) * rounding)
    bounded = np.where(weights < np.float32(1e30), weights, np.float32(1e30))
    np.testing.assert_array_equal(out, np.where(bounded > np.float32(1e-30), bounded, np.float32(1e-30)))


@levels
@pytest.mark.parametrize("n", [64, 128, 384, 4096])
def test_products_of_integers_are_exact(simd: int, n: int) -> None:
    generator = np.random.default_rng(n)
    for query, vector in (
        (np.full(n, 4095, np.int16), np.full(n, 127, np.int8)),
        (np.full(n, -4095, np.int16), np.full(n, 127, np.int8)),
        (generator.integers(-4095, 4096, n, np.int16), generator.integers(-127, 128, n, np.int8)),
    ):
        out, err = ffi.new("int32_t *"), new_error()
        sides = ffi.from_buffer("int16_t[]", query), ffi.from_buffer("int8_t[]", vector)
        check(lib.cotra_kernel_dot_i8(simd, *sides, n, out, err), err)
        assert out[0] == int(query.astype(np.int64) @ vector.astype(np.int64))


@levels
@fixed(200)
@given(data=st.data())
def test_least_is_the_first_of_the_least(simd: int, data: st.DataObject) -> None:
    n = 16 * data.draw(st.integers(1, 5))
    few = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4))
    keys = data.draw(st.lists(st.sampled_from([*few, np.inf]), min_size=n, max_size=n))
    assert least(simd, keys) == keys.index(min(keys))


@levels
@fixed(60)
@given(words=st.integers(0, 600), seed=st.integers(0, 2**32 - 1), content=st.integers(0, 2**32))
def test_the_checksum_of_any_bytes(simd: int, words: int, seed: int, content: int) -> None:
    data = np.random.default_rng(content).bytes(8 * words)
    for each in (data, bytes(len(data)), b"\xff" * len(data)):
        assert checksum_in_c(simd, each, seed) == checksum(each, seed)


@pytest.mark.parametrize("content", ["zeros", "ones", "random"])
def test_damage_changes_the_checksum(content: str) -> None:
    """Each bit of a record, each cache line of it from another version, words exchanged, and a word more or less."""
    generator = np.random.default_rng(0)
    record = {"zeros": bytes(952), "ones": b"\xff" * 952, "random": generator.bytes(952)}[content]
    right = checksum_in_c(LEVELS[-1], record, 7)
    damaged = []
    for bit in range(8 * len(record)):
        copy = bytearray(record)
        copy[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(copy))
    for start in range(0, len(record) - 64, 64):
        for line in (generator.bytes(64), bytes(63) + b"\x01", b"\x80" + bytes(63), b"\xfe" * 64):
            damaged.append(record[:start] + line + record[start + 64 :])
    damaged += [record[8:], record + bytes(8), bytes(8) + record]
    if content == "random":
        damaged += [record[i : i + 8] + record[8:i] + record[:8] + record[i + 8 :] for i in range(8, 952, 8)]
    sums = [checksum_in_c(LEVELS[-1], each, 7) for each in damaged]
    assert right not in sums
    assert len(set(sums)) == len(set(damaged))
    assert right != checksum_in_c(LEVELS[-1], record, 8)


def test_checksums_are_spread_over_all_values() -> None:
    sums = [checksum_in_c(LEVELS[-1], bytes(56), seed) for seed in range(2**14)]
    bits = np.unpackbits(np.array(sums, "<u4").view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)
    assert (abs(bits - 0.5) < 0.02).all()
    assert len(set(sums)) >= len(sums) - 1


@levels
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_nothing_is_read_past_the_end(simd: int, kind: type) -> None:
    """Queries and vectors end, padded, where the memory does."""
    generator = np.random.default_rng(2)
    queries, vectors = GuardedMemory(4 * 4096), GuardedMemory(4 * 4096)
    for dim in (*range(1, 140), *DIMS[-3:]):
        query = padded(generator.integers(0, 16, dim).astype(np.float32), 32)
        vector = padded(generator.integers(0, 16, dim).astype(kind), 32 // np.dtype(kind).itemsize)
        guarded_query = queries.hold(query.tobytes()).view(np.float32)
        guarded_vector = vectors.hold(vector.tobytes()).view(kind)
        for metric in METRICS:
            expected = exact(metric, query[:dim], vector[:dim])[0]
            assert distance_in_place(simd, metric, dim, guarded_query, guarded_vector) == expected


@levels
def test_nothing_is_read_past_the_end_of_codes_and_records(simd: int) -> None:
    generator = np.random.default_rng(3)
    one, other = GuardedMemory(4 * 4096), GuardedMemory(4 * 4096)
    for code_dim in (64, 128, 1088, 4096):
        table, codes = (generator.integers(0, 256, (code_dim // 4, 16), np.uint8) for _ in range(2))
        guarded = (memory.hold(each.tobytes()).reshape(-1, 16) for memory, each in ((one, table), (other, codes)))
        assert (scan(simd, *guarded) == scan_by_hand(table, codes)).all()
    for words in range(1, 270):
        data = generator.bytes(8 * words)
        assert checksum_in_c(simd, one.hold(data), 5) == checksum(data, 5)


@pytest.mark.parametrize(
    ("dim", "metric", "vector_type"), [(0, 0, 0), (4097, 0, 0), (2**32 - 1, 0, 0), (8, 3, 0), (8, 0, 3), (8, 0, 2**31)]
)
def test_what_is_no_vector_is_refused(dim: int, metric: int, vector_type: int) -> None:
    err = new_error()
    query, vector = ffi.new("float[8]"), ffi.new("float[8]")
    with pytest.raises(InvalidInputError):
        check(
            lib.cotra_kernel_distance(PORTABLE, metric, vector_type, query, vector, dim, ffi.new("float *"), err), err
        )


@pytest.mark.parametrize("code_dim", [0, 1, 63, 65, 4096 + 64])
def test_codes_come_in_words_of_64_bits(code_dim: int) -> None:
    err = new_error()
    with pytest.raises(InvalidInputError, match="64"):
        check(lib.cotra_kernel_scan(PORTABLE, ffi.NULL, ffi.NULL, code_dim, ffi.NULL, err), err)


def test_keys_and_words_that_are_not_whole_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="multiple of 16"):
        least(PORTABLE, [0.0] * 15)
    with pytest.raises(InvalidInputError, match="multiple of 8"):
        checksum_in_c(PORTABLE, bytes(12), 0)


@pytest.mark.parametrize("simd", [simd for simd in (-1, 0, 1, 2, 3, 4, 99) if simd not in LEVELS])
def test_levels_that_this_cpu_does_not_have(simd: int) -> None:
    err = new_error()
    with pytest.raises(InvalidInputError, match=f"no {named(simd)} kernels"):
        check(lib.cotra_kernel_scan(simd, ffi.NULL, ffi.NULL, 64, ffi.NULL, err), err)
    with pytest.raises(InvalidInputError, match=f"no {named(simd)} kernels"):
        check(lib.cotra_kernel_distance(simd, 0, 0, ffi.NULL, ffi.NULL, 1, ffi.NULL, err), err)
    with pytest.raises(InvalidInputError, match=f"no {named(simd)} kernels"):
        estimate(simd, np.zeros(32, np.uint32), np.zeros(32, np.float32), np.zeros(32, np.float32), [0.0] * 5)
    with pytest.raises(InvalidInputError, match=f"no {named(simd)} kernels"):
        least(simd, [0.0] * 16)
    with pytest.raises(InvalidInputError, match=f"no {named(simd)} kernels"):
        checksum_in_c(simd, bytes(8), 0)
