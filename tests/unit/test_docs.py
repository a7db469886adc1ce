"""The documentation is true: its Python runs, its hex is what goes over the wire, its format page reads a real image."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import typer.main

import cotra_rdma
from cotra_rdma import Shard, errors
from cotra_rdma._bench.build import BuildPoint
from cotra_rdma._bench.environment import Environment
from cotra_rdma._bench.runner import Point
from cotra_rdma._bench.scaling.costs import Check, Cost, ShardsRow, SizeRow
from cotra_rdma._bench.scaling.peers import HomeRow, LossRow, Target
from cotra_rdma._bench.scaling.prediction import Fit, Prediction, Variation, Workload
from cotra_rdma._bench.scaling.study import Study
from cotra_rdma._bench.summary import Comparison
from cotra_rdma._native.library import check, new_error
from cotra_rdma.cli import app
from cotra_rdma.protocol.collection_search import CollectionResponse
from cotra_rdma.protocol.envelope import VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.regions import decode_region_request, decode_region_response, encode_region
from cotra_rdma.protocol.remote_expansion import ExpandRequest, ExpandResponse
from cotra_rdma.protocol.search import SearchRequest, SearchResponse
from cotra_rdma.protocol.tables import (
    BuildExchangeRequest,
    BuildExchangeResponse,
    CoarseRouteRequest,
    CoarseRouteResponse,
)
from helpers.rotation import rotate, signs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "bench" / "README.md"])
RUNNABLE = ("../README.md", "tutorial.md", "howto/secure.md", "howto/tuning.md", "howto/own-algorithm.md")

Bytes = npt.NDArray[np.uint8]


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page in order: (language, text)."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading or a line of text, without its two head lines."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i in range(lines.index(heading), len(lines)) if lines[i].startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in one namespace; each print followed by `# -> text` printed just that, in order."""
    monkeypatch.chdir(tmp_path)
    source = "\n".join(text for _, text in blocks(DOCS / name, "python"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), {"__name__": "docs"})
    lines = iter(printed.getvalue().splitlines())
    for promised in re.findall(r"^ *print\(.*\)  # -> (.*)$", source, re.MULTILINE):
        assert promised in lines, promised


def search_response(payload: bytes) -> bytes:
    """Of one shard, or of the whole collection."""
    with contextlib.suppress(errors.FormatError):
        return b"".join(SearchResponse.decode(payload).encode())
    return b"".join(CollectionResponse.decode(payload).encode())


def test_the_hex_of_the_wire_page() -> None:
    """Each Python block makes `message`; the hex block after it is what that encodes to, and decodes back to it."""
    namespace: dict[str, Any] = {}
    decoders = {
        VShardMessageType.VECTOR_SCATTER_REQUEST: lambda payload: SearchRequest.decode(payload).encode(),
        VShardMessageType.VECTOR_SCATTER_RESPONSE: search_response,
        VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST: lambda payload: CoarseRouteRequest.decode(payload).encode(),
        VShardMessageType.VECTOR_COARSE_ROUTE_RESPONSE: lambda payload: CoarseRouteResponse.decode(payload).encode(),
        VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST: lambda payload: BuildExchangeRequest.decode(payload).encode(),
        VShardMessageType.VECTOR_BUILD_EXCHANGE_RESPONSE: lambda payload: BuildExchangeResponse.decode(
            payload
        ).encode(),
        VShardMessageType.VECTOR_MEM_REGION_REQUEST: lambda payload: encode_region(decode_region_request(payload)),
        VShardMessageType.VECTOR_MEM_REGION_RESPONSE: lambda payload: encode_region(decode_region_response(payload)),
        VShardMessageType.VECTOR_EXPAND_REQUEST: lambda payload: b"".join(ExpandRequest.decode(payload).encode()),
        VShardMessageType.VECTOR_EXPAND_RESPONSE: lambda payload: b"".join(ExpandResponse.decode(payload).encode()),
    }
    seen = set()
    for language, text in blocks(DOCS / "reference" / "wire.md", "python", "hex"):
        if language == "python":
            exec(text, namespace)
            continue
        message = namespace.pop("message")
        raw = bytes.fromhex(re.sub(r"#.*", "", text))
        assert message.encode() == raw
        decoded = VShardEnvelope.decode(raw)
        assert decoded.encode() == raw
        assert decoders[decoded.msg_type](decoded.payload) == decoded.payload
        seen.add(decoded.msg_type)
    assert seen == set(decoders) == set(VShardMessageType)


def test_the_envelope_table_of_the_wire_page() -> None:
    rows = table(DOCS / "reference" / "wire.md", "## The envelope: `VShardEnvelope`, version 2")
    values = {"version": 2, "msg_type": 50, "source_node": 3, "target_node": 4, "vshard_id": 5, "payload_len": 1}
    raw = VShardEnvelope(2, VShardMessageType(50), 3, 4, 5, b"x").encode()
    for offset, size, kind, name, _ in rows[:-1]:
        assert int(size) == int(kind[1:]) // 8
        assert int.from_bytes(raw[int(offset) : int(offset) + int(size)], "little") == values.pop(name.strip("`"))
    assert not values
    assert int(rows[-1][0]) == len(raw) - 1


def test_the_errors_page_is_complete() -> None:
    page = DOCS / "reference" / "errors.md"
    header = (ROOT / "csrc" / "include" / "cotra.h").read_text(encoding="utf-8")
    numbers = dict(
        re.findall(r"^ +(COTRA_[A-Z_]+) = (-?\d+),? +/\*", header.partition("} cotra_status;")[0], re.MULTILINE)
    )
    told = {row[1].strip("`"): (row[0], row[2].strip("`")) for row in table(page, "## C statuses")}
    assert {name: number for name, (number, _) in told.items()} == numbers | {"COTRA_OK": "0"}
    exceptions = {row[0].removeprefix("&nbsp;").strip(" `") for row in table(page, "## Exceptions")}
    public = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert exceptions == public - {"CotraError"}
    for name, (number, python) in told.items():
        if int(number) < 0:
            with pytest.raises(getattr(errors, python, MemoryError)) as caught:
                check(int(number), new_error())
            assert caught.type.__name__ == python, name


# ---- the format page, as the one who reads an image by it alone ----


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def keys() -> list[int]:
    state, made = 0, []
    for _ in range(128):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        made.append(z ^ z >> 31)
    return made


KEYS = keys()


def checksum(raw: bytes, seed: int) -> int:
    words = struct.unpack(f"<{len(raw) // 8}Q", raw)
    state, first = len(raw) << 32 | seed, -len(words) % 8
    while words:
        chunk, words = words[: 128 - first], words[128 - first :]
        total = 0
        for word, key in zip(chunk, KEYS[first:], strict=False):
            total += (word + key) % 2**32 * (((word >> 32) + (key >> 32)) % 2**32)
        state = (state + total) * 0xFF51AFD7ED558CCD % 2**64
        state ^= state >> 32
        first = 0
    return state * 0xC4CEB9FE1A85EC53 % 2**64 >> 32


class Image:
    """An image read by docs/reference/format.md."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.header: dict[str, int] = {}
        self.end = 0
        for offset, size, kind, name, _ in table(DOCS / "reference" / "format.md", "## Header"):
            assert int(offset) == self.end
            assert int(size) == int(kind[1:]) // 8
            self.end += int(size)
            field = int.from_bytes(raw[int(offset) : self.end], "little")
            assert self.header.setdefault(name.strip("`"), field) == field
        head = self.header
        self.dim, self.bits = head["dim"], head["code_dim"]
        self.element = np.dtype(["<f4", "<f2", "u1"][head["vector_type"]])
        slots = round_up(head["degree"], 32)
        self.numbers = 32 + round_up(self.dim * self.element.itemsize, 32)
        self.f0 = self.numbers + 4 * slots
        self.f1 = self.f0 + 2 * slots
        self.codes = self.f1 + 2 * slots
        self.slots = slots

    def record(self, node: int) -> bytes:
        start = self.header["records_offset"] + node * self.header["record_bytes"]
        return self.raw[start : start + self.header["record_bytes"]]

    def head(self, node: int) -> dict[str, int]:
        fields, end = {}, 0
        for offset, size, kind, name, _ in table(DOCS / "reference" / "format.md", "The head:"):
            assert (int(offset), int(size)) == (end, int(kind[1:]) // 8)
            end += int(size)
            fields[name.strip("`")] = int.from_bytes(self.record(node)[int(offset) : end], "little")
        assert end == 32
        return fields

    def array(self, node: int, offset: int, kind: str | np.dtype[Any], count: int) -> npt.NDArray[Any]:
        return np.frombuffer(self.record(node), kind, count, offset)

    def stored(self, node: int) -> npt.NDArray[Any]:
        return self.array(node, 32, self.element, self.dim).astype(np.float64)

    def vector(self, node: int) -> npt.NDArray[Any]:
        stored = self.stored(node)
        scaled = self.header["metric"] == 2 and self.header["vector_type"] != 0
        return stored / np.linalg.norm(stored) if scaled else stored

    def code(self, node: int, slot: int) -> npt.NDArray[np.float64]:
        start = self.codes + slot // 32 * self.bits * 4
        nibbles = self.array(node, start, "u1", self.bits * 4).reshape(-1, 16)[:, slot % 16]
        nibbles = nibbles >> 4 if slot % 32 >= 16 else nibbles & 15
        return np.where(nibbles[:, np.newaxis] >> np.arange(4) & 1, 1.0, -1.0).reshape(-1)


@pytest.fixture(
    params=[
        ("l2", np.float32, 100, 16),
        ("ip", np.float16, 130, 8),
        ("cosine", np.float32, 24, 20),
        ("cosine", np.uint8, 70, 8),
        ("l2, centred", np.float32, 64, 8),
    ]
)
def image(request: pytest.FixtureRequest) -> tuple[Image, Shard]:
    metric, dtype, dim, m = request.param
    generator = np.random.default_rng(4)
    vectors = generator.standard_normal((300, dim)).astype(dtype)
    if dtype == np.uint8:
        vectors = generator.integers(0, 256, (300, dim), np.uint8)
    if metric == "l2, centred":  # some clusters are tight, and far from the mean
        metric, vectors[:150] = "l2", vectors[0] + 1e-3 * vectors[:150]
    with (
        Shard.build(vectors, metric=metric, M=m, ef_construction=40, seed=7, n_threads=1) as shard,
        shard.arena.view() as view,
    ):
        return Image(bytes(view)), shard


def test_the_header_of_the_format_page(image: tuple[Image, Shard]) -> None:
    page, shard = image
    info, head = shard.info, page.header
    assert struct.pack("<Q", head.pop("magic")) == b"COTRAHG1"
    assert page.end == 192
    assert not any(page.raw[192:4096])
    assert head["header_checksum"] == checksum(page.raw[:12] + bytes(4) + page.raw[16:192], 0)
    metrics, types = ("l2", "ip", "cosine"), ("float32", "float16", "uint8")
    for name in head.keys() - {"header_checksum", "nav_checksum", "ivf_checksum", "reserved", "metric", "vector_type"}:
        assert head[name] == getattr(info, name), name
    assert (metrics[head["metric"]], types[head["vector_type"]]) == (info.metric, info.vector_type)
    assert (head["records_offset"], head["code_dim"]) == (4096, round_up(info.dim, 64))
    assert head["nav_offset"] == 4096 + head["count"] * head["record_bytes"]
    assert head["image_bytes"] == head["nav_offset"] + head["nav_bytes"] + head["ivf_bytes"] == len(page.raw)
    assert head["record_bytes"] == round_up(page.codes + page.slots // 32 * page.bits * 4, 64)
    if (info.vector_type, info.dim, info.M) == ("float32", 100, 16):
        example = (page.numbers, page.f0, page.f1, page.codes, head["record_bytes"])
        assert example == (448, 576, 640, 704, 1216)


def test_the_records_of_the_format_page(image: tuple[Image, Shard], request: pytest.FixtureRequest) -> None:
    page, _ = image
    name = request.node.callspec.params["image"][0]
    l2 = page.header["metric"] == 0
    mean = np.frombuffer(page.raw, "<f4", page.dim, page.header["nav_offset"]).astype(np.float64)
    np.testing.assert_allclose(mean, np.mean([page.vector(i) for i in range(300)], axis=0), atol=1e-6)
    centre = mean if l2 else np.zeros(page.dim)
    flips = signs(page.header["seed"], page.bits)
    centred = 0
    for node in (0, 1, 2, 298, 299):
        head = page.head(node)
        expected = {"node": node, "label": node, "reserved": 0, "generation": 1}
        assert {name: head[name] for name in expected} == expected
        norm2 = struct.unpack("<f", struct.pack("<I", head["norm2"]))[0]
        np.testing.assert_allclose(norm2, 0 if l2 else page.stored(node) @ page.stored(node), rtol=1e-6)
        assert head["checksum"] == checksum(page.record(node)[8:], node)
        numbers = page.array(node, page.numbers, "<u4", page.slots)
        halves = (page.array(node, at, "<u2", page.slots) for at in (page.f0, page.f1))
        f0, f1 = ((half.astype("<u4") << 16).view("<f4") for half in halves)
        count = head["count"]
        assert 0 < count <= page.header["degree"]
        assert (numbers[count:] == 0xFFFFFFFF).all()
        assert not f0[count:].any()
        assert not f1[count:].any()
        own = page.vector(node)
        gaps = [np.linalg.norm(page.vector(int(number)) - own) for number in numbers[:count]]
        far = np.linalg.norm(own - centre) > 32 * min(gap for gap in gaps if gap > 0)
        assert head["flags"] == 2 * far
        centred += far
        for slot in range(count):
            difference = page.vector(int(numbers[slot])) - own
            r, code = rotate(difference, flips), page.code(node, slot)
            clear = np.abs(r) > 1e-5  # float32 may round the others to the other side of 0
            np.testing.assert_array_equal(code[clear], np.where(r >= 0, 1.0, -1.0)[clear])
            scale = (2 if l2 else 1) * (r @ r) / np.abs(r).sum()
            rest = r @ r if l2 else -own @ difference
            shift = 0 if far else f1[slot] * (code @ rotate(own - centre, flips))
            np.testing.assert_allclose(f1[slot], scale, rtol=2**-8)
            np.testing.assert_allclose(f0[slot], rest + shift, rtol=2**-8, atol=1e-3 if not far else 1e-9)
    assert bool(centred) == ("centred" in name)


def test_the_navigation_section_of_the_format_page(image: tuple[Image, Shard]) -> None:
    page, _ = image
    head, raw = page.header, page.raw
    start, n, width = head["nav_offset"], head["upper_count"], 1 + head["M"]
    nodes_at = round_up(4 * page.dim, 8)
    first_at = nodes_at + round_up(4 * n, 8)
    rows_at = first_at + round_up(4 * (n + 1), 8)
    nodes = np.frombuffer(raw, "<u4", n, start + nodes_at)
    first = np.frombuffer(raw, "<u4", n + 1, start + first_at)
    rows = np.frombuffer(raw, "<u4", int(first[n]) * width, start + rows_at).reshape(-1, width)
    vectors_at = round_up(rows_at + 4 * rows.size, 64)
    stride = round_up(page.dim * page.element.itemsize, 32)
    assert n > 0
    assert (np.diff(nodes.astype(int)) > 0).all()
    assert np.diff(first.astype(int)).max() == head["max_level"]
    assert head["nav_bytes"] == round_up(vectors_at + n * stride, 64)
    assert head["nav_checksum"] == checksum(raw[start : start + head["nav_bytes"]], 1)
    for u, node in enumerate(nodes):
        own = np.frombuffer(raw, page.element, page.dim, start + vectors_at + u * stride)
        np.testing.assert_array_equal(own, page.stored(int(node)))
    for row in rows:
        assert (row[1 : 1 + row[0]] < n).all()
        assert not row[1 + row[0] :].any()
    chain = 0
    for node in range(head["count"]):
        chain = checksum(struct.pack("<Q", chain << 32 | page.head(node)["checksum"]), 2)
    assert head["image_checksum"] == head["nav_checksum"] << 32 | chain


@pytest.fixture(
    params=[("l2", np.uint8, 70, 1), ("ip", np.float32, 24, 4), ("cosine", np.float32, 64, 2), ("l2", np.float16, 9, 8)]
)
def listed(request: pytest.FixtureRequest) -> tuple[Image, int]:
    """An image with inverted lists, and its bits."""
    metric, dtype, dim, bits = request.param
    vectors = (60 * np.random.default_rng(4).random((150, dim))).astype(dtype)
    built = Shard.build(vectors, metric=metric, M=4, ef_construction=20, n_threads=1, n_lists=5, ivf_bits=bits)
    with built as shard, shard.arena.view() as view:
        return Image(bytes(view)), bits


def test_the_inverted_lists_of_the_format_page(listed: tuple[Image, int]) -> None:
    page, bits = listed
    raw = page.raw[page.header["ivf_offset"] :]
    head, end = {}, 0
    for offset, size, kind, name, _ in table(DOCS / "reference" / "format.md", "The section's header:"):
        assert (int(offset), int(size)) == (end, int(kind[1:]) // 8)
        end += int(size)
        head[name.strip("`")] = int.from_bytes(raw[int(offset) : end], "little")
    assert end == 64
    assert struct.pack("<Q", head["magic"]) == b"COTRAIV1"
    expected = {"version": 2, "n_lists": 5, "bits": bits, "code_dim": page.bits, "entries": 150, "reserved": 0}
    assert {name: head[name] for name in expected} == expected
    assert page.header["ivf_checksum"] == checksum(raw[:64], 3)
    assert page.header["ivf_bytes"] == len(raw) == head["table_bytes"] + head["list_bytes"]
    assert head["table_checksum"] == checksum(raw[64 : head["table_bytes"]], 4)

    element = np.dtype(("<f4", "<f2")[head["centroid_type"]])
    stride, column = round_up(page.dim * element.itemsize, 32), round_up(4 * 5, 64)
    at = 64 + round_up(5 * stride, 64)
    assert head["table_bytes"] == at + 4 * column
    sizes, radii, errors, sums = (
        np.frombuffer(raw, kind, 5, at + i * column) for i, kind in enumerate(("<u4", "<f4", "<f4", "<u4"))
    )
    flips = signs(page.header["seed"], page.bits)
    at, block_bytes, seen = head["table_bytes"], 4 * bits * page.bits + 512, []
    l2, prefix = page.header["metric"] == 0, 32 + round_up(page.dim * page.element.itemsize, 32)
    for number in range(5):
        centroid = np.frombuffer(raw, element, page.dim, 64 + number * stride).astype(np.float64)
        n_blocks = round_up(int(sizes[number]), 32) // 32
        blocks = [raw[at + b * block_bytes : at + (b + 1) * block_bytes] for b in range(n_blocks)]
        at += n_blocks * block_bytes
        assert sums[number] == sum(checksum(block, b) for b, block in enumerate(blocks)) % 2**32
        squares, wrong = [], []
        for entry in range(32 * n_blocks):
            block, slot = blocks[entry // 32], entry % 32
            columns = np.frombuffer(block, "<u4", 128, block_bytes - 512).reshape(4, 32)[:, slot]
            f0, f1 = columns[:2].copy().view("<f4")
            if entry >= sizes[number]:
                assert columns[2] == 0xFFFFFFFF
                continue
            row = int(columns[2])
            seen.append(row)
            assert columns[3] == checksum(page.record(row)[8:prefix], row)
            planes = np.frombuffer(block, "u1", block_bytes - 512).reshape(bits, -1, 16)[:, :, slot % 16]
            planes = planes >> 4 if slot >= 16 else planes & 15
            levels = (planes[:, :, np.newaxis] >> np.arange(4) & 1).reshape(bits, -1)
            v = 2.0 * (levels << np.arange(bits)[:, np.newaxis]).sum(axis=0) - (2**bits - 1)
            difference = page.vector(row) - centroid
            r = rotate(difference, flips)
            clear = np.abs(r) > 1e-4
            np.testing.assert_array_equal(np.sign(v)[clear], np.sign(r)[clear])
            cosine = r @ v / np.linalg.norm(r) / np.linalg.norm(v)
            steps = np.abs(r).max() * np.linspace(1.02, 0.383, 27) / 2 ** (bits - 1)
            tried = [2 * np.minimum(np.abs(r) // step, 2 ** (bits - 1) - 1) + 1 for step in steps]
            assert cosine == pytest.approx(
                max(np.abs(r) @ t / np.linalg.norm(r) / np.linalg.norm(t) for t in tried), rel=1e-4
            )
            scale = (2 if l2 else 1) * (r @ r) / (r @ v)
            rest = r @ r if l2 else -centroid @ difference
            np.testing.assert_allclose(f1, scale, rtol=1e-3)
            np.testing.assert_allclose(f0, rest, rtol=2e-3, atol=2e-2)
            squares.append(r @ r)
            wrong.append(r @ r * (cosine**-2 - 1) / (page.bits - 1))
        np.testing.assert_allclose(radii[number], np.sqrt(np.mean(squares)), rtol=1e-4)
        np.testing.assert_allclose(errors[number], np.sqrt(np.mean(wrong)), rtol=2e-2)
    assert sorted(seen) == list(range(150))
    assert at == len(raw)


# ---- all pages ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in names, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_pages_name_are_there(page: Path) -> None:
    """Paths from the top of the repository, without placeholders, and the package's modules by their dotted names."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:src|csrc|tests|tools|bench|docs|\.ci)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for path in re.findall(r"`(_\w+/\w+\.py|(?:protocol|seam)/\w+\.py)`", text):
        assert (ROOT / "src" / "cotra_rdma" / path).exists(), path
    for name in re.findall(r"`cotra_rdma((?:\.[a-z_]\w*)+)", text):
        parts = name[1:].split(".")
        found = ROOT / "src" / "cotra_rdma" / parts[0]
        assert found.exists() or found.with_suffix(".py").exists() or hasattr(cotra_rdma, parts[0]), name
        if found.is_dir() and parts[1:]:
            assert (found / parts[1]).exists() or (found / f"{parts[1]}.py").exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    commands = {verb: group.get_command(None, verb) for verb in group.list_commands(None)}
    for _, text in blocks(page, "console"):
        for line in text.splitlines():
            if match := re.match(r"cotra ([a-z]+)(.*)", line.split("  #")[0]):
                known = {option for item in commands[match[1]].params for option in item.opts} | {"--help"}
                assert set(re.findall(r"(?<=\s)-{1,2}[a-zA-Z][\w-]*", match[2])) <= known, line


def test_the_json_of_bench_is_documented() -> None:
    """Every key, in order."""
    kinds = (Environment, Point, BuildPoint, Comparison)
    for (_, keys), kind in zip(table(DOCS / "cli.md", '`{"summary": [...]}`.'), kinds, strict=True):
        told = re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", re.sub(r"\([^)]*\)", "", keys))))
        assert told == [field.name for field in dataclasses.fields(kind)]


def test_the_json_of_a_scaling_study_is_documented() -> None:
    """Every key of every object in it."""
    rows = table(DOCS / "cli.md", "| key of `scaling` | what it holds |")
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", " ".join(cell for row in rows for cell in row)))))
    for kind in (
        Study,
        ShardsRow,
        Cost,
        SizeRow,
        HomeRow,
        LossRow,
        Target,
        Workload,
        Fit,
        Check,
        Prediction,
        Variation,
    ):
        assert {field.name for field in dataclasses.fields(kind)} <= told, kind
