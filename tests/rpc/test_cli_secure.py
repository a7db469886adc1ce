"""The command line with certificates, and how `cotra serve` ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner, Result

import cotra_rdma
from cotra_rdma import Stop, Tls, TransportError
from cotra_rdma._reader.batch import make_batch
from cotra_rdma.cli import app
from helpers.begun import waited

Floats = npt.NDArray[np.float32]
COTRA = (sys.executable, "-m", "cotra_rdma.cli")


def cotra(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env={"COLUMNS": "200", **(env or {})}).invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of an owner and a reader, made by the command."""
    path = tmp_path_factory.mktemp("keys")
    made = json.loads(cotra("certs", path, "owner", "--host", "127.0.0.1", "--json").stdout)
    assert made == {
        name: str(path / file)
        for name, file in zip(("certificate", "key", "ca"), ("owner.pem", "owner.key", "ca.pem"), strict=True)
    }
    assert cotra("certs", path, "reader").exit_code == 0
    return path


@pytest.fixture(scope="module")
def index(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secure")
    np.save(path / "base.npy", words[:1000])
    np.save(path / "queries.npy", words[:3])
    made = cotra("build", path / "base.npy", path / "index", "--metric", "cosine", "--threads", 1)
    assert made.exit_code == 0, made.output
    return path


def variables(keys: Path, name: str) -> dict[str, str]:
    return {
        "COTRA_TLS_CERT": str(keys / f"{name}.pem"),
        "COTRA_TLS_KEY": str(keys / f"{name}.key"),
        "COTRA_TLS_CA": str(keys / "ca.pem"),
    }


@contextmanager
def serving(index: Path, *options: object, env: dict[str, str] | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    command = [*COTRA, "serve", str(index / "index"), "--json", *map(str, options)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(env or {})}
    ) as owner:
        assert owner.stdout is not None
        line = owner.stdout.readline()
        try:
            yield owner, json.loads(line)
        finally:
            if owner.poll() is None:
                owner.kill()


def test_every_verb_that_talks_to_owners_shows_its_certificate(index: Path, keys: Path) -> None:
    options = ("--tls-cert", keys / "owner.pem", "--tls-key", keys / "owner.key", "--tls-ca", keys / "ca.pem")
    reader = variables(keys, "reader")
    with serving(index, *options) as (_, ready):
        asks = {
            "search": ("search", ready["address"], "--queries", index / "queries.npy"),
            "info": ("info", ready["address"]),
        }
        for name, command in asks.items():
            assert cotra(*command, env=reader).exit_code == 0, name
            refused = cotra(*command)
            assert refused.exit_code == 1, name
        assert "cannot be reached" in cotra(*asks["search"]).output
        told = cotra("doctor", "--peer", ready["address"], env=reader).output
        assert "shm works" in " ".join(told.split()) or "1024 bytes" in told


@pytest.mark.parametrize("missing", ["--tls-cert", "--tls-key", "--tls-ca"])
def test_two_of_three_files_are_a_usage_error(keys: Path, missing: str) -> None:
    files = {"--tls-cert": keys / "owner.pem", "--tls-key": keys / "owner.key", "--tls-ca": keys / "ca.pem"}
    del files[missing]
    done = cotra("info", "127.0.0.1:1", *(part for pair in files.items() for part in pair))
    assert done.exit_code == 2
    assert f"{missing}: is missing" in " ".join(done.output.split())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_listening_beyond_this_host_takes_certificates_or_a_word(index: Path, host: str) -> None:
    done = cotra("serve", index / "index", "--listen", f"{host}:0")
    assert done.exit_code == 2
    assert "or --insecure" in " ".join(done.output.split())


def test_the_log_says_that_an_owner_is_insecure(index: Path) -> None:
    with serving(index, "--listen", "0.0.0.0:0", "--insecure", "--no-announce") as (owner, _):
        owner.send_signal(signal.SIGTERM)
        assert b"served without TLS" in owner.stderr.read()
        assert owner.wait() == 0


class TestCertificates:
    @pytest.mark.parametrize("name", ["", "ca", "a/b", "..", "x" * 65, "a\nb"])
    def test_bad_names(self, tmp_path: Path, name: str) -> None:
        done = cotra("certs", tmp_path / "new", name)
        assert done.exit_code == 1
        assert "cannot be the name of a certificate" in done.output
        assert not (tmp_path / "new").exists()

    def test_nothing_is_replaced(self, tmp_path: Path) -> None:
        assert cotra("certs", tmp_path, "one").exit_code == 0
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        done = cotra("certs", tmp_path, "one")
        assert done.exit_code == 1
        assert "is there already" in done.output
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
            "ca.pem": 0o644,
            "ca.key": 0o600,
            "one.pem": 0o644,
            "one.key": 0o600,
        }

    def test_half_an_authority(self, tmp_path: Path) -> None:
        assert cotra("certs", tmp_path, "one").exit_code == 0
        (tmp_path / "ca.pem").unlink()
        done = cotra("certs", tmp_path, "two")
        assert done.exit_code == 1
        assert "the authority in" in done.output

    def test_the_secret_is_in_no_text(self, keys: Path) -> None:
        files = Tls(keys / "owner.pem", keys / "owner.key", keys / "ca.pem")
        assert "PRIVATE" not in repr(files)


@pytest.mark.parametrize(("signals", "answered"), [(1, True), (2, False)])
def test_a_signal_lets_work_in_progress_end_and_a_second_one_does_not(
    index: Path, words: Floats, signals: int, answered: bool
) -> None:
    queries = np.tile(words[:1000], (2, 1))  # seconds of work, in one request
    batch = make_batch(queries, queries.shape[1], (1000,), k=10, ef=1000, beam=8, stop=Stop())
    with (
        serving(index, "--transport", "rpc", "--grace", 120, "--metrics", "127.0.0.1:0") as (owner, ready),
        cotra_rdma.connect(ready["address"], transport="rpc") as cluster,
        ThreadPoolExecutor(1) as pool,
    ):
        search = pool.submit(cluster._connections[0].calls._search_part, batch, queries)
        waited(lambda: n_in_progress(ready["metrics"]) == 1)
        for _ in range(signals):
            owner.send_signal(signal.SIGTERM)
            waited(lambda: refuses(ready["address"]))
        if answered:
            assert search.result()[0].shape == (2000, 10)
        else:
            with pytest.raises(TransportError):
                search.result()
        assert owner.wait() == 0


def n_in_progress(metrics: str) -> int:
    """Requests that an owner has not answered yet."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as answer:
        (found,) = re.findall(r"^cotra_requests_in_progress\S* (\d+)", answer.read().decode(), re.MULTILINE)
    return int(found)


def refuses(address: str) -> bool:
    try:
        cotra_rdma.connect(address, transport="rpc", timeout_s=5).close()
    except TransportError:
        return True
    return False
