"""A rebuild that is killed at any point leaves the old collection or the new one, whole."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import MANIFEST, Collection, shard_paths
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import InvalidInputError

N_KILLS = 50


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "base.npy", np.random.default_rng(1).normal(size=(120, 4)).astype(np.float32))
    return tmp_path / "base.npy"


def build(source: Path, out: Path, n_shards: int) -> Collection:
    with open_vectors(source) as vectors:
        return build_collection(vectors, out, n_shards, M=4, ef_construction=10, n_threads=1, force=True)


def check_whole(out: Path) -> Collection:
    """Each file that the manifest names is there, and of its build."""
    collection = Collection.load(out)
    paths = shard_paths([out])
    assert [path.name for path in paths] == [entry.name for entry in collection.shards]
    for number, (path, entry) in enumerate(zip(paths, collection.shards, strict=True)):
        with Shard.open(path) as shard:
            assert (shard.info.generation, shard.info.image_checksum) == (collection.generation, entry.image_checksum)
        assert collection.coarse_table(out, number) is not None
    return collection


def test_kills_at_random_points(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin = time.monotonic()
    last = build(source, out, 2).generation
    took_s = time.monotonic() - begin
    dice, seen = random.Random(7), set()
    for turn in range(N_KILLS):
        child = os.fork()
        if not child:
            try:
                build(source, out, 2 + turn % 2)
            finally:
                os._exit(0)
        time.sleep(dice.uniform(0.2, 1.4) * took_s)
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)[1] == 0
        now = check_whole(out).generation
        assert now > last if ended else now >= last
        seen.add((ended, now > last))
        last = now
    assert len(set(out.glob(".building-*"))) <= 1  # the next build removes what the last one left
    final = build(source, out, 1)
    assert final.generation > last
    assert {path.name for path in out.iterdir()} == {MANIFEST, final.shards[0].name, final.shards[0].coarse_name}


def test_scratch_of_a_build_in_progress_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, 1)
    mine, dead = out / ".building-mine", out / ".building-dead"
    for path in (mine, dead):
        path.mkdir()
        (path / "part").write_text("x")
    held = os.open(mine, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        build(source, out, 1)
    finally:
        os.close(held)
    assert (mine.exists(), dead.exists()) == (True, False)


def test_a_file_that_the_manifest_does_not_name_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, 1)
    left = out / "shard-000-g7.cotra"
    left.write_bytes((out / "shard-000.cotra").read_bytes())
    with pytest.raises(InvalidInputError, match="does not name it"):
        shard_paths([left])
    assert shard_paths([out / "shard-000.cotra"]) == [out / "shard-000.cotra"]
