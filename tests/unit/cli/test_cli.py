"""The `cotra` command without a network: help, usage errors, the shape of errors, build, doctor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from cotra_rdma._collection.manifest import Collection
from cotra_rdma._diagnose import verbs as verbs_diagnosis
from cotra_rdma._diagnose.host import Check, Host, Status
from cotra_rdma.cli import app, doctor, options

VERBS = ("build", "serve", "search", "info", "doctor", "certs", "demo", "bench")


def cotra(*arguments: object) -> Result:
    """Runs the command in this process; what it prints is `stdout` and `stderr`, without colours."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    np.save(tmp_path / "base.npy", np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32))
    return tmp_path / "base.npy"


@pytest.fixture
def shard(vectors: Path, tmp_path: Path) -> Path:
    assert cotra("build", vectors, tmp_path / "index").exit_code == 0
    return tmp_path / "index" / "shard-000.cotra"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_names_every_option_and_gives_examples(verb: str) -> None:
    result = cotra(verb, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert f"cotra {verb}" in result.stdout.split("Examples")[1]
    rows = [line for line in result.stdout.splitlines() if re.match(r"│ (\* )? {0,4}--[a-zA-Z]", line)]
    assert rows
    assert all(len(row.strip("│ ").split()) > 3 for row in rows), "an option without help"


def test_who_can_walk(shard: Path) -> None:
    alone = cotra("serve", shard, "--walk")
    assert alone.exit_code == 1
    assert "cotra build --graph global makes one" in alone.stderr
    twice = cotra("serve", shard, shard, "--walk")
    assert twice.exit_code == 1
    assert "shards of one collection, each given once" in twice.stderr


def test_version_and_no_arguments() -> None:
    assert re.fullmatch(r"cotra \d+\.\d+\.\d+\S*\n", cotra("--version").stdout)
    assert all(verb in cotra().stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("fly",), "No such command"),
        (("build",), "Missing argument"),
        (("build", "nowhere.npy", "out"), "nowhere.npy"),
        (("build", __file__, "out", "--shards", "0"), "--shards"),
        (("build", __file__, "out", "--peers", "127.0.0.1:1"), "--peers"),
        (("build", __file__, "out", "--listen", "127.0.0.1:1"), "--listen"),
        (("build", __file__, "out", "--shard", "0", "--peers", "127.0.0.1:1"), "--graph global"),
        (("build", __file__, "out", "--shard", "1"), "needs --peers"),
        (
            ("build", __file__, "out", "--shard", "0", "--graph", "global", "--shards", "2", "--peers", "127.0.0.1:1"),
            "1 addresses for 2",
        ),
        (
            ("build", __file__, "out", "--shard", "1", "--graph", "global", "--peers", "127.0.0.1:1"),
            "not in the range 0 to 0",
        ),
        (("build", __file__, "out", "--shard", "0", "--peers", "127.0.0.1:1", "--processes", "2"), "--processes"),
        (("build", __file__, "out", "--metric", "manhattan"), "manhattan"),
        (("build", __file__, "out", "--partition", "random"), "random"),
        (("build", __file__, "out", "--vector-type", "int4"), "int4"),
        (("serve", __file__, "--listen", "7700"), "not HOST:PORT"),
        (("serve", __file__, "--listen", "localhost:70000"), "not HOST:PORT"),
        (("serve", __file__, "--shard", "-1"), "--shard"),
        (("serve", __file__, "--announce", "a:b:c"), "not HOST or HOST:PORT"),
        (("serve", __file__, "--announce", "0.0.0.0"), "nobody else reaches this host at 0.0.0.0"),
        (("serve", __file__, "--announce", "[::]:7700"), "nobody else reaches this host at [::]"),
        (("serve", __file__, "--announce", "a", "--no-announce"), "contradicts --no-announce"),
        (("serve", __file__, "--halo", "0.5"), "needs --walk"),
        (("serve", __file__, "--peer", "a:1"), "needs --walk"),
        (("serve", __file__, "--walk", "--peer", "a:1,b"), "'a:1,b' is not HOST:PORT"),
        (("serve", __file__, "--walk", "--halo", "-1"), "--halo"),
        (("serve", __file__, "--transport", "verbs,tcp"), "'tcp' is not one of verbs, shm, rpc"),
        (("search", "127.0.0.1:1"), "--queries"),
        (("search", "127.0.0.1:1", "--queries", __file__, "--out", "answers.csv"), "must end in .npy or .npz"),
        (("search", "127.0.0.1:1", "--queries", __file__, "--transport", "tcp"), "'tcp' is not one of"),
        (("search", "127.0.0.1:0", "--queries", __file__), "'127.0.0.1:0' is neither HOST:PORT"),
        (("search", "a:1,", "b:1,nowhere", "--queries", __file__), "'b:1,nowhere' is neither HOST:PORT"),
        (("search", "127.0.0.1:1", ".", "--queries", __file__), "give one collection and nothing else"),
        (("info",), "Missing argument"),
        (("info", "nowhere"), "'nowhere' is neither HOST:PORT"),
        (("info", __file__, "127.0.0.1:1"), "shard files or addresses, not both"),
        (("info", ".", __file__), "one collection, and nothing else"),
        (("bench",), "give --dataset"),
        (("bench", "--dataset", "x", "--ef", "16,many"), "'16,many' is not a list"),
        (("bench", "--dataset", "x", "--ef", "8"), "8 is less than k = 10"),
        (("bench", "--dataset", "x", "--threads", "0,1"), "'0,1' is not a list of positive"),
        (("bench", "--dataset", "x", "--inflight", "some"), "'some' is not a list of whole numbers from 0 on"),
        (("bench", "--dataset", "x", "--cache-bytes", "1%,few"), "'few' is no number of bytes"),
        (("bench", "--dataset", "x", "--queries-zipf", "1.0"), "'1.0' is not EXPONENT:N"),
        (("search", "127.0.0.1:1", "--queries", __file__, "--cache-bytes", "-1"), "--cache-bytes"),
        (
            ("bench", "--dataset", "x", "--compare", "hnswlib,annoy"),
            "'annoy' is not one of hnswlib, faiss, usearch, rabitqlib, none",
        ),
    ],
)
def test_usage_errors_are_status_2(arguments: tuple[str, ...], reason: str) -> None:
    result = cotra(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_one_line_and_status_1(tmp_path: Path, as_json: bool) -> None:
    (tmp_path / "base.npy").write_bytes(b"no vectors here")
    result = cotra("build", tmp_path / "base.npy", tmp_path / "out", *["--json"] * as_json)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    if as_json:
        error = json.loads(result.stderr)["error"]
        assert (error["type"], error["shard"]) == ("FormatError", None)
        assert "not a whole .npy file" in error["message"]
    else:
        assert result.stderr.startswith(f"error: {tmp_path / 'base.npy'}: not a whole .npy file")


def test_build(vectors: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    report = json.loads(
        cotra(
            "build", vectors, out, "--shards", 3, "--M", 8, "--metric", "ip", "--vector-type", "float16", "--json"
        ).stdout
    )
    assert (report["count"], report["M"], report["metric"], report["out_dir"]) == (200, 8, "ip", str(out))
    assert [entry["count"] for entry in report["shards"]] == [66, 67, 67]
    assert len(Collection.load(out).shards) == 3
    again = cotra("build", vectors, out)
    assert again.exit_code == 1
    assert "--force" in again.stderr
    shown = cotra("build", vectors, out, "--force")
    assert shown.exit_code == 0
    assert "200 x 8 vectors, l2" in shown.stdout


def test_build_by_kmeans(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    centres = 20 * generator.normal(size=(4, 8))
    rows = centres[generator.integers(0, 4, 1000)] + generator.normal(size=(1000, 8))
    np.save(tmp_path / "base.npy", rows.astype(np.float32))
    options = ("build", tmp_path / "base.npy", tmp_path / "index", "--shards", 4)
    report = json.loads(cotra(*options, "--partition", "kmeans", "--json").stdout)
    assert report["partition"] == "kmeans"
    assert report["compass_shards"] < 2
    assert max(entry["count"] for entry in report["shards"]) <= 275
    assert "Compass: 1." in cotra(*options, "--partition", "kmeans", "--force").stdout
    assert "every query asks all shards" in cotra(*options, "--force").stdout
    report = json.loads(cotra(*options, "--graph", "global", "--force", "--json").stdout)
    assert (report["graph"], report["partition"]) == ("global", "kmeans")
    failed = cotra(*options, "--graph", "global", "--partition", "range", "--force")
    assert failed.exit_code == 1


def test_serve_tells_bad_shards(shard: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.cotra"
    truncated.write_bytes(shard.read_bytes()[:-100])
    for path in (truncated, tmp_path):
        result = cotra("serve", path, "--json")
        assert result.exit_code == 1
        assert json.loads(result.stderr)["error"]["type"] == "FormatError"


def test_serve_tells_bad_numbers_of_shards(shard: Path) -> None:
    for path, reason in ((shard.parent, "has no shard 1: its shards are 0 to 0"), (shard, "is no collection")):
        result = cotra("serve", path, "--shard", 0, "--shard", 1, "--json")
        assert result.exit_code == 1
        assert reason in json.loads(result.stderr)["error"]["message"]


def test_search_of_a_collection_that_nobody_serves(shard: Path, vectors: Path) -> None:
    for more in ((), ("--allow-partial",)):
        result = cotra("search", shard.parent, "--queries", vectors, *more, "--json")
        assert result.exit_code == 1
        message = json.loads(result.stderr)["error"]["message"]
        assert message == "1 of 1 shards have no owner that answers: shard 0: no owner is noted in owners.json"


def test_info(shard: Path) -> None:
    """What is in it is tested in test_inspection.py: here is how it is shown."""
    shown = cotra("info", shard.parent)
    assert shown.exit_code == 0
    for cell in ("200 in 1 shard", "dim 8, l2, M 16, generation 1", "none, as far as owners.json says"):
        assert cell in shown.stdout
    report = json.loads(cotra("info", shard.parent, "--json").stdout)
    assert (report["count"], report["balance"], report["cross_share"], report["problems"]) == (200, 1.0, 0.0, [])
    assert (report["collection"]["metric"], report["graph_ids"]) == ("l2", ["0x0000000000000000"])
    (told,) = report["shards"]
    assert (told["here"], told["count"], told["owners"]) == (True, 200, [])
    assert told["image_bytes"] == shard.stat().st_size == pytest.approx(200 * told["bytes_per_vector"])
    assert sum(told["degrees"]) == told["levels"][0] == 200
    assert sum(told["links_to"]) + told["links_elsewhere"] == told["links"]
    page = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8").partition("## info")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("## doctor")[0], re.MULTILINE))
    assert list(rows) == list(report)
    assert re.findall(r"\w+", " ".join(re.findall(r"`(.*?)`", rows["shards"]))) == list(told)
    assert re.findall(r"\w+", re.findall(r"`(format_version, .*?)`", page)[0]) == list(told["header"])
    shard.write_bytes(shard.read_bytes()[:-64])
    broken = cotra("info", shard.parent)
    assert broken.exit_code == 1
    assert "does not fit: " in broken.stdout
    assert json.loads(cotra("info", shard, "--json").stdout)["problems"]
    for name in ("other.json", "collection.json"):
        manifest = shard.parent / name
        manifest.write_text('{"format":')
        malformed = cotra("info", manifest)
        assert malformed.exit_code == 1
        assert malformed.stderr.startswith(f"error: {manifest}: malformed manifest: Expecting value")
        manifest.unlink()
    empty = cotra("info", shard.parent.parent)
    assert empty.exit_code == 1
    assert "collection.json" in empty.stderr


def test_search_of_nobody(vectors: Path) -> None:
    result = cotra("search", "127.0.0.1:1", "--queries", vectors, "--timeout", 0.2, "--json")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in json.loads(result.stderr)["error"]["message"]


def test_search_with_a_ground_truth_of_other_queries(vectors: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "gt.npy", np.zeros((3, 10), np.int32))
    result = cotra("search", "127.0.0.1:1", "--queries", vectors, "--ground-truth", tmp_path / "gt.npy")
    assert result.exit_code == 1
    assert "must be [200, 10 or more]" in result.stderr


@pytest.mark.parametrize("usable", [True, False])
def test_doctor(capsys: pytest.CaptureFixture[str], usable: bool) -> None:
    found = Check(
        "thing", Status.OK if usable else Status.FAILED, "this [bold]was[/] seen", "" if usable else "do that"
    )
    checks = [found, Check("other", Status.WARNING, "x", "y")]

    def reported(*, as_json: bool) -> str:
        with pytest.raises(typer.Exit) as ended:
            doctor.report(checks, as_json=as_json)
        assert ended.value.exit_code == (0 if usable else 1)
        return capsys.readouterr().out

    told = json.loads(reported(as_json=True))
    assert told["usable"] is usable
    assert told["checks"][0]["name"] == "thing"
    shown = reported(as_json=False)
    assert "this [bold]was[/] seen" in shown
    assert ("do that" in shown) is not usable


def test_demo_of_a_word_that_is_not_there() -> None:
    result = cotra("demo", "king", "xyzzyplugh")
    assert result.exit_code == 1
    assert "xyzzyplugh" in result.stderr
    assert "king" not in result.stderr


def test_numbers_and_lists() -> None:
    assert options.comma_list(["a,b", " c ", ",,"]) == ["a", "b", "c"]
    assert options.numbers("64, 16,16", "--ef") == [16, 64]
    assert options.transports(["shm,rpc", "shm"], ["rpc", "shm"]) == ("shm", "rpc")


def test_no_device_has_the_remedy(tmp_path: Path) -> None:
    assert "rdma link add rxe0 type rxe netdev eth0" in verbs_diagnosis.soft_roce(Host(tmp_path))
    vendor = tmp_path / "sys/bus/pci/devices/0000:01:00.0/vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x15b3\n")
    assert verbs_diagnosis.soft_roce(Host(tmp_path)).startswith("sudo modprobe mlx5_ib")


def test_every_command_in_the_docs_has_the_options_it_uses() -> None:
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^cotra (\w+)(.*)$", "".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)), re.MULTILINE
    )
    assert {verb for verb, _ in commands} == set(VERBS)
    for verb, arguments in commands:
        known = set(re.findall(r"--[\w-]+", cotra(verb, "--help").stdout))
        assert set(re.findall(r"--[\w-]+", arguments)) <= known, f"cotra {verb}{arguments}"
