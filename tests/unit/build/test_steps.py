"""The build of one graph: the same bytes from any number of processes, their memory, and what they do not believe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import FormatError, InvalidInputError, PeerError, Shard
from cotra_rdma._build.collection import build_collection
from cotra_rdma._build.mail import CountsMessage, DirectoryMail, ImageMessage, Message, RowsMessage, array_of
from cotra_rdma._build.processes import BuildProcesses, Usage
from cotra_rdma._build.spec import BuildSpec
from cotra_rdma._build.steps import STEPS, builder_in
from cotra_rdma._collection.manifest import Collection
from cotra_rdma._shard.params import BuildParams
from cotra_rdma.datasets import open_vectors

Floats = npt.NDArray[np.float32]
N, N_SHARDS = 1500, 3
KNOBS: dict[str, Any] = {"metric": "cosine", "M": 8, "ef_construction": 40, "graph": "global", "n_threads": 1}
PARAMS = BuildParams("cosine", M=8, ef_construction=40, n_threads=1)


@pytest.fixture(scope="module")
def source(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "base.npy"
    np.save(path, words[:N])
    return path


@pytest.fixture(scope="module")
def here(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in this process."""
    out = tmp_path_factory.mktemp("here") / "index"
    with open_vectors(source) as vectors:
        build_collection(vectors, out, N_SHARDS, **KNOBS, n_lists=12)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_processes_make_the_same_bytes(source: Path, here: Path, tmp_path: Path) -> None:
    used: list[Usage] = []
    seen: list[tuple[int, str, int]] = []
    with open_vectors(source) as vectors:
        build_collection(
            vectors,
            tmp_path / "index",
            N_SHARDS,
            **KNOBS,
            n_lists=12,
            processes=2,
            usage=used.append,
            progress=lambda *step: seen.append(step),
        )
    assert contents(tmp_path / "index") == contents(here)
    assert len(used) == 2
    assert all(builder.cpu_s > 0 and builder.peak_bytes > 1 << 20 for builder in used)
    assert {phase for _, phase, _ in seen} == {"partition", "build", "link", "pack", "border", "relink", "calibrate"}
    assert (-1, "partition", N) in seen
    assert {done for _, phase, done in seen if phase == "relink"} >= {N}


def test_the_manifest_tells_what_the_images_are(source: Path, here: Path) -> None:
    built, base = Collection.load(here), 0
    rows = np.load(source)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert built.calibration is not None
    for entry in built.shards:
        with Shard.open(here / entry.name) as shard:
            info = shard.info
            assert (info.graph_id, info.graph_base, info.graph_count) == (built.graph_id, entry.base, N)
            assert (entry.image_checksum, entry.generation) == (info.image_checksum, info.generation)
            assert (entry.count, entry.image_bytes, entry.base) == (info.count, info.image_bytes, base)
            labels = shard.labels()
        assert entry.first_id == labels[0] == labels.min()
        assert entry.centroid is not None
        centres = np.array([other.centroid for other in built.shards])
        gaps = np.square(unit[labels, np.newaxis] - centres).sum(axis=2)
        assert (gaps.argmin(axis=1) == built.shards.index(entry)).mean() > 0.7
        base += entry.count
    assert base == N


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"graph_id": 0}, "base"),
        ({"graph_id": 1 << 64}, "graph_id"),
    ],
)
def test_manifests_that_do_not_add_up(here: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    for name, content in contents(here).items():
        (tmp_path / name).write_bytes(content)
    manifest = json.loads((tmp_path / "collection.json").read_text())
    (tmp_path / "collection.json").write_text(json.dumps(manifest | change))
    with pytest.raises(FormatError, match=reason):
        Collection.load(tmp_path)


def test_builders_that_are_killed(source: Path, tmp_path: Path) -> None:
    spec = BuildSpec(N, 100, N_SHARDS, PARAMS, 1)
    with open_vectors(source) as vectors, BuildProcesses(2, spec, vectors, tmp_path) as pool:

        def kill(_number: int, phase: str, _done: int) -> None:
            if phase == "build":
                for process in pool._processes:
                    process.kill()

        with pytest.raises(PeerError, match=r"ended in step 'build' of shard [01], with status -9") as caught:
            pool.run(kill)
    assert caught.value.shard in (0, 1)


def test_what_a_builder_raises_is_raised_here(words: Floats, tmp_path: Path) -> None:
    rows = words[:300].copy()
    rows[77, 3] = np.nan
    np.save(tmp_path / "bad.npy", rows)
    with open_vectors(tmp_path / "bad.npy") as vectors, pytest.raises(InvalidInputError, match=r"vector \d+ holds NaN"):
        build_collection(vectors, tmp_path / "index", 2, **KNOBS, processes=2)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [({"processes": -1}, "processes must be"), ({"processes": 2, "graph": "independent"}, "one graph over several")],
)
def test_processes_that_make_no_sense(source: Path, tmp_path: Path, knobs: dict[str, Any], reason: str) -> None:
    with open_vectors(source) as vectors, pytest.raises(InvalidInputError, match=reason):
        build_collection(vectors, tmp_path / "index", 2, **(KNOBS | knobs))


# ---- memory ----

MEMORY = """
import json, sys
import numpy as np
from pathlib import Path
from cotra_rdma._build import border, steps
from cotra_rdma._clustering import balanced, kmeans
from cotra_rdma._routing import exact_neighbours, model
from cotra_rdma._build.processes import Usage
from cotra_rdma.datasets import open_vectors
from cotra_rdma._build.spec import BuildSpec
from cotra_rdma._build.steps import FIRST_ALONE, STEPS, builder_in
from cotra_rdma._shard.params import BuildParams

# Samples and chunks of a fixed size, made small: what is left grows with the shard, or not at all.
steps._HELD_OUT = kmeans.ROWS_PER_CENTROID = balanced.ROWS_PER_CENTROID = balanced.ROWS_PER_PART = 16
exact_neighbours.CHUNK_FLOATS = model.CHUNK_FLOATS = kmeans._CHUNK_FLOATS = border._CACHE_BYTES = 1 << 18
out, count, dim = Path(sys.argv[1]), int(sys.argv[2]), 1024
loaded = Usage.of_this_process().peak_bytes
generator = np.random.default_rng(0)
mix = generator.standard_normal((4, dim), np.float32)
rows = np.lib.format.open_memmap(out / "in.npy", "w+", np.float32, (count, dim))
for begin in range(0, count, 1000):
    rows[begin : begin + 1000] = generator.standard_normal((1000, 4), np.float32) @ mix
del rows
peaks = {}
with open_vectors(out / "in.npy") as vectors:
    spec = BuildSpec(count, dim, 2, BuildParams(ef_construction=5, n_threads=1), 1)
    for step in STEPS[:-1]:
        for number in (0,) if step in FIRST_ALONE else (1, 0):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
            builder_in(spec, vectors, out, number, None).run(step)
            peaks[step] = Usage.of_this_process().peak_bytes
print(json.dumps({"loaded": loaded, "peaks": peaks, "image": (out / "shard-000.cotra").stat().st_size}))
"""
LOADED_BYTES = 70 << 20  # the interpreter with all libraries: 44 MiB measured
SHARE = 1.6  # measured 1.26 to 1.36 while linking: images, upper layers and their sketches, and what malloc keeps
BUFFERS_BYTES = 45 << 20  # what a step takes beside that, with the samples and chunks of MEMORY: 31 MiB measured


@pytest.mark.skipif("COTRA_SANITIZED" in os.environ, reason="AddressSanitizer keeps memory that was freed")
def test_no_step_takes_more_than_its_share_of_memory(tmp_path: Path) -> None:
    """No step's peak passes 1.6 times the shard's image and a fixed part, nor grows faster between a small and a large build."""
    figures = []
    for count in (4000, 16_000):
        (tmp_path / str(count)).mkdir()
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(count)), str(count)]
        env = dict(os.environ) | {"OPENBLAS_NUM_THREADS": "1"}  # threads that wait would spin
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        figures.append(json.loads(done.stdout))
    for build in figures:
        assert build["loaded"] <= LOADED_BYTES, build
        fixed = {step: peak - build["loaded"] - SHARE * build["image"] for step, peak in build["peaks"].items()}
        assert max(fixed.values()) <= BUFFERS_BYTES, fixed
    small, large = figures
    grown = large["image"] - small["image"]
    assert grown > 20 << 20
    slopes = {step: (large["peaks"][step] - small["peaks"][step]) / grown for step in STEPS[:-1]}
    assert max(slopes.values()) <= SHARE, slopes
    assert slopes["build"] > 0.5 < slopes["link"], slopes  # the images were there, and seen


# ---- messages ----


def test_values_of_messages_are_checked(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="7 bytes were received where"):
        array_of(bytes(7), "<f4", (2,), "centroid")
    with pytest.raises(FormatError, match="NaN"):
        array_of(np.array([1, np.nan], "<f4").tobytes(), "<f4", (2,), "centroid")
    for content in ({"step": "divide", "rows": "text"}, {"step": "divide"}, {"step": "link", "rows": b""}, []):
        (tmp_path / "divide-3-all").write_bytes(msgspec.msgpack.encode(content))
        with pytest.raises(FormatError, match="message divide of shard 3"):
            DirectoryMail(tmp_path, 0).receive(RowsMessage, 3)


@pytest.fixture
def divided(source: Path, tmp_path: Path) -> Path:
    """A build after the step `divide`, of two shards."""
    spec = BuildSpec(N, 100, 2, PARAMS, 1)
    with open_vectors(source) as vectors:
        for step in STEPS[:3]:
            for number in range(1 if step == "train" else 2):
                builder_in(spec, vectors, tmp_path, number, None).run(step)
    (tmp_path / "spec").write_bytes(msgspec.json.encode(spec))
    return tmp_path


def change(directory: Path, number: int, to: int | None, kind: type[Message], **fields: Any) -> None:
    """Builder `number` sends something else than it did."""
    message, _ = DirectoryMail(directory, number if to is None else to).receive(kind, number)
    DirectoryMail(directory, number).send(msgspec.structs.replace(message, **fields), to)


@pytest.mark.parametrize(
    ("kind", "to", "fields", "reason"),
    [
        (RowsMessage, 0, {"rows": np.array([5, 5], "<u4").tobytes()}, "do not ascend"),
        (RowsMessage, 0, {"rows": np.array([5, 750], "<u4").tobytes()}, "not among its 750"),
        (RowsMessage, 0, {"rows": b"123"}, "3 bytes were received where"),
        (RowsMessage, 0, {"rows": np.arange(750, dtype="<u4").tobytes()}, "was given 1138 rows"),
        (CountsMessage, None, {"counts": np.array([700, 51], "<i8").tobytes()}, "not those of 750 rows"),
        (CountsMessage, None, {"counts": np.array([-1, 751], "<i8").tobytes()}, "not those of 750 rows"),
        (CountsMessage, None, {"total": np.full(100, np.inf).tobytes()}, "NaN or infinity"),
    ],
)
def test_hostile_builders_are_not_believed(
    source: Path, divided: Path, kind: type[Message], to: int | None, fields: dict[str, Any], reason: str
) -> None:
    spec = msgspec.json.decode((divided / "spec").read_bytes(), type=BuildSpec)
    change(divided, 1, to, kind, **fields)
    with open_vectors(source) as vectors, pytest.raises(FormatError, match=reason):
        builder_in(spec, vectors, divided, 0, None).run("build")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"count": 1}, "holds 1 vectors, and a coarse table of"),
        ({"dim": 99}, "is of dim 99"),
        ({"seed": 1}, "cannot be one graph: seed"),
        ({"first_id": N}, "first id"),
        ({"centroid": b""}, "centroid of shard 1"),
        ({"image_checksum": -1}, "checksum"),
    ],
)
def test_hostile_images_are_not_linked(source: Path, divided: Path, fields: dict[str, Any], reason: str) -> None:
    spec = msgspec.json.decode((divided / "spec").read_bytes(), type=BuildSpec)
    with open_vectors(source) as vectors:
        for number in range(2):
            builder_in(spec, vectors, divided, number, None).run("build")
        message, table = DirectoryMail(divided, 0).receive(ImageMessage, 1)
        assert message.count == table.sizes.sum()
        change(divided, 1, None, ImageMessage, **fields)
        with pytest.raises((FormatError, InvalidInputError), match=reason):
            builder_in(spec, vectors, divided, 0, None).run("link")
