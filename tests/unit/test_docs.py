"""The documentation is true: its Python runs, its hex is what goes over the wire, its format page reads a real image."""

from __future__ import annotations

import contextlib
import io
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import typer.main

from cotra_rdma import Shard, errors
from cotra_rdma._native import check, new_error
from cotra_rdma.cli import app
from cotra_rdma.messages import (
    SearchRequest,
    SearchResponse,
    decode_region_request,
    decode_region_response,
    encode_region,
)
from cotra_rdma.wire import VShardEnvelope, VShardMessageType

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "ARCHITECTURE.md", ROOT / "README.md", ROOT / "bench" / "README.md"])
RUNNABLE = ("../README.md", "tutorial.md", "howto/secure.md", "howto/tuning.md")

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


def test_the_hex_of_the_wire_page() -> None:
    """Each Python block makes `message`; the hex block after it is what that encodes to, and decodes back to it."""
    namespace: dict[str, Any] = {}
    decoders = {
        VShardMessageType.VECTOR_SCATTER_REQUEST: lambda payload: SearchRequest.decode(payload).encode(),
        VShardMessageType.VECTOR_SCATTER_RESPONSE: lambda payload: b"".join(SearchResponse.decode(payload).encode()),
        VShardMessageType.VECTOR_MEM_REGION_REQUEST: lambda payload: encode_region(decode_region_request(payload)),
        VShardMessageType.VECTOR_MEM_REGION_RESPONSE: lambda payload: encode_region(decode_region_response(payload)),
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
    assert seen == set(decoders)


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
    public = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert exceptions == public - {"CotraError"}
    for name, (number, python) in told.items():
        if int(number) < 0:
            with pytest.raises(getattr(errors, python, MemoryError)) as caught:
                check(int(number), new_error())
            assert caught.type.__name__ == python, name


# ---- the format page, as the one who reads an image by it alone ----


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def crc(state: int, word: int) -> int:
    state ^= word
    for _ in range(64):
        state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state


def checksum(raw: bytes, seed: int) -> int:
    words = struct.unpack(f"<{len(raw) // 8}Q", raw)
    lanes = [seed, seed ^ 0x9E3779B9, seed ^ 0x7F4A7C15, seed ^ 0xF39CC060]
    whole = len(words) // 4 * 4
    for i, word in enumerate(words):
        lane = i % 4 if i < whole else 0
        lanes[lane] = crc(lanes[lane], word)
    a, b, c, d = lanes
    return crc(crc(a, b << 32 | c), len(raw) << 32 | d)


def signs(seed: int, dim: int) -> npt.NDArray[np.float64]:
    bits: list[float] = []
    mask = 2**64 - 1
    while len(bits) < 4 * dim:
        seed = seed + 0x9E3779B97F4A7C15 & mask
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        z ^= z >> 31
        bits += [1.0 if z >> j & 1 else -1.0 for j in range(64)]
    return np.array(bits).reshape(4, dim)


def rotate(vector: npt.NDArray[Any], flips: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    n = flips.shape[1]
    window = 1 << n.bit_length() - 1
    hadamard = np.ones((1, 1))
    while len(hadamard) < window:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    out = np.zeros(n)
    out[: len(vector)] = vector
    for number, flip in enumerate(flips):
        out *= flip
        part = slice(n - window, n) if number % 2 else slice(0, window)
        out[part] = hadamard @ out[part] / np.sqrt(window)
        if window < n:
            low, high = np.split(out, 2)
            out = np.concatenate([low + high, low - high]) / np.sqrt(2)
    return out


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
        self.f1 = self.f0 + 4 * slots
        self.codes = self.f1 + 4 * slots
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

    def vector(self, node: int) -> npt.NDArray[Any]:
        return self.array(node, 32, self.element, self.dim).astype(np.float64)

    def code(self, node: int, slot: int) -> npt.NDArray[np.float64]:
        start = self.codes + slot // 32 * self.bits * 4
        nibbles = self.array(node, start, "u1", self.bits * 4).reshape(-1, 16)[:, slot % 16]
        nibbles = nibbles >> 4 if slot % 32 >= 16 else nibbles & 15
        return np.where(nibbles[:, np.newaxis] >> np.arange(4) & 1, 1.0, -1.0).reshape(-1)


@pytest.fixture(params=[("l2", np.float32, 100, 16), ("ip", np.float16, 130, 8), ("cosine", np.float32, 24, 20)])
def image(request: pytest.FixtureRequest) -> tuple[Image, Shard]:
    metric, dtype, dim, m = request.param
    vectors = np.random.default_rng(4).standard_normal((300, dim)).astype(dtype)
    with (
        Shard.build(vectors, metric=metric, M=m, ef_construction=40, seed=7, n_threads=1) as shard,
        shard.arena.view() as view,
    ):
        return Image(bytes(view)), shard


def test_the_header_of_the_format_page(image: tuple[Image, Shard]) -> None:
    page, shard = image
    info, head = shard.info, page.header
    assert struct.pack("<Q", head.pop("magic")) == b"COTRAHG1"
    assert page.end == 168
    assert not any(page.raw[168:4096])
    assert head["header_checksum"] == checksum(page.raw[:12] + bytes(4) + page.raw[16:168], 0)
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
        assert example == (448, 576, 704, 832, 1344)


def test_the_records_of_the_format_page(image: tuple[Image, Shard]) -> None:
    page, _ = image
    mean = np.frombuffer(page.raw, "<f4", page.dim, page.header["nav_offset"]).astype(np.float64)
    np.testing.assert_allclose(mean, np.mean([page.vector(i) for i in range(300)], axis=0), atol=1e-6)
    flips = signs(page.header["seed"], page.bits)
    for node in (0, 299):
        head = page.head(node)
        expected = {"node": node, "label": node, "flags": 0, "reserved": 0, "generation": 1, "reserved2": 0}
        assert {name: head[name] for name in expected} == expected
        assert head["checksum"] == checksum(page.record(node)[8:], node)
        numbers = page.array(node, page.numbers, "<u4", page.slots)
        f0, f1 = (page.array(node, at, "<f4", page.slots) for at in (page.f0, page.f1))
        count = head["count"]
        assert 0 < count <= page.header["degree"]
        assert (numbers[count:] == 0xFFFFFFFF).all()
        assert not f0[count:].any()
        assert not f1[count:].any()
        own = page.vector(node)
        for slot in range(count):
            difference = page.vector(int(numbers[slot])) - own
            r, code = rotate(difference, flips), page.code(node, slot)
            clear = np.abs(r) > 1e-5  # float32 may round the others to the other side of 0
            np.testing.assert_array_equal(code[clear], np.where(r >= 0, 1.0, -1.0)[clear])
            scale = (2 if page.header["metric"] == 0 else 1) * (r @ r) / np.abs(r).sum()
            rest = r @ r if page.header["metric"] == 0 else -own @ difference
            np.testing.assert_allclose(f1[slot], scale, rtol=1e-4)
            np.testing.assert_allclose(
                f0[slot], rest + scale * (code @ rotate(own - mean, flips)), rtol=1e-3, atol=1e-4
            )


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
        np.testing.assert_array_equal(own, page.vector(int(node)))
    for row in rows:
        assert (row[1 : 1 + row[0]] < n).all()
        assert not row[1 + row[0] :].any()
    chain = 0
    for node in range(head["count"]):
        chain = checksum(struct.pack("<Q", chain << 32 | page.head(node)["checksum"]), 2)
    assert head["image_checksum"] == head["nav_checksum"] << 32 | chain


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
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for _, text in blocks(page, "console"):
        for line in text.splitlines():
            if match := re.match(r"cotra ([a-z]+)(.*)", line.split("  #")[0]):
                known = {option for item in commands[match[1]].params for option in item.opts} | {"--help"}
                assert set(re.findall(r"(?<=\s)-{1,2}[a-zA-Z][\w-]*", match[2])) <= known, line
