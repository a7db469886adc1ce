"""What `cotra search` tells of a search: a summary, tables, and files of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cotra_rdma._reader.cost_model import Prediction
from cotra_rdma._reader.result import SearchResult
from cotra_rdma.cli import output
from cotra_rdma.errors import CotraError

SHOWN_QUERIES, SHOWN_ANSWERS = 3, 10


def write_answers(path: Path, result: SearchResult) -> None:
    """Writes answers as .npz, or else as .npy with the fields `id` and `distance`."""
    if path.suffix == ".npz":
        np.savez(path, ids=result.ids, distances=result.distances, incomplete=result.incomplete)
        return
    answers = np.empty(result.ids.shape, [("id", "<i8"), ("distance", "<f4")])
    answers["id"], answers["distance"] = result.ids, result.distances
    np.save(path, answers)


def summarize(
    result: SearchResult, recall: float | None, seconds: float, names: list[str], unreached: Mapping[int, CotraError]
) -> dict[str, Any]:
    """Makes the object that `--json` prints.

    Args:
        result: what the search returned.
        recall: recall@k, or None if there is no ground truth.
        seconds: the time of the search.
        names: what to call each shard: its owner's address, or "shard N".
        unreached: the shards that this process did not reach, and why.
    """
    p50, p99 = np.percentile(result.stats["latency_ns"] / 1e3, (50, 99))
    return {
        "recall": recall,
        "qps": len(result.ids) / seconds,
        "p50_us": float(p50),
        "p99_us": float(p99),
        "reads_per_query": float(result.stats["reads"].mean()),
        "cached_records_per_query": float(result.stats["cached_records"].mean()),
        "rounds_per_query": float(result.stats["rounds"].mean()),
        "bytes_per_query": float(result.stats["read_bytes"].mean()),
        "pushed_per_query": float(result.stats["pushed"].mean()),
        "own_per_query": float(result.stats["own"].mean()),
        "local_share": None if math.isnan(result.local_share) else result.local_share,
        "walked_at_home": None if result.homes is None else int((result.homes >= 0).sum()),
        "transports": dict(zip(names, result.transports, strict=True)),
        "coverage": result.coverage,
        "incomplete": int(result.incomplete.sum()),
        "failures": {names[at]: str(error) for at, error in sorted(result.failures.items())},
        "algorithm": result.algorithm,
        "shards_per_query": float(result.asked.mean()),
        "predictions": [
            {**asdict(expected), "seconds": expected.seconds if math.isfinite(expected.seconds) else None}
            for expected in result.predictions
        ],
        "unreached": {names[at]: str(error) for at, error in unreached.items() if at not in result.failures},
    }


def show(summary: dict[str, Any], result: SearchResult, k: int) -> None:
    """Prints the summary, the cost model's predictions if there are any, and the first answers."""
    _show_summary(summary, len(result.ids), k)
    if result.predictions:
        _show_predictions(summary, result)
    for number, (ids, distances) in enumerate(zip(result.ids[:SHOWN_QUERIES], result.distances, strict=False)):
        there = [f"{i} ({distance:.4g})" for i, distance in zip(ids, distances, strict=True) if i >= 0]
        more = f"  and {len(there) - SHOWN_ANSWERS} more" if len(there) > SHOWN_ANSWERS else ""
        output.out.print(f"query {number}: {'  '.join(there[:SHOWN_ANSWERS]) or 'no answer'}{more}", soft_wrap=True)


def _show_summary(summary: dict[str, Any], n_queries: int, k: int) -> None:
    without = ", ".join(summary["failures"])
    share_of = "shards and queries" if summary["incomplete"] else "the shards"
    output.print_table(
        ("", ""),
        [
            ("queries", f"{n_queries:,}"),
            (f"recall@{k}", "no ground truth given" if summary["recall"] is None else f"{summary['recall']:.4f}"),
            ("queries a second", f"{summary['qps']:,.0f}"),
            ("latency", f"p50 {summary['p50_us']:,.0f} us, p99 {summary['p99_us']:,.0f} us"),
            ("READs per query", f"{summary['reads_per_query']:.1f}"),
            ("records from the cache", f"{summary['cached_records_per_query']:.1f} per query"),
            ("from own memory", f"{summary['own_per_query']:.1f} per query"),
            (
                "own memory or cache",
                "-" if (share := summary["local_share"]) is None else f"{share:.0%} of all records",
            ),
            *_homes(summary, n_queries),
            ("expanded by owners", f"{summary['pushed_per_query']:.1f} per query"),
            ("rounds per query", f"{summary['rounds_per_query']:.1f}"),
            ("read per query", output.human_bytes(summary["bytes_per_query"])),
            *((f"path to {address}", path) for address, path in summary["transports"].items()),
            ("coverage", f"{summary['coverage']:.0%} of {share_of}{without and f', without {without}'}"),
            *(
                [("cut short by --max-expansions", f"{summary['incomplete']:,} queries, which coverage leaves out")]
                if summary["incomplete"]
                else []
            ),
            *((f"no answer from {address}", why) for address, why in summary["failures"].items()),
            *((f"not reached: {shard}", f"{why}; the peers did") for shard, why in summary["unreached"].items()),
            ("algorithm", summary["algorithm"]),
            ("shards per query", f"{summary['shards_per_query']:.2f}"),
        ],
    )


def _homes(summary: dict[str, Any], n_queries: int) -> list[tuple[str, str]]:
    at_home = summary["walked_at_home"]
    if at_home is None:
        return []
    here = n_queries - at_home
    return [
        ("walked at home", f"{at_home:,}" + (f", and {here:,} from here: their homes did not answer" if here else ""))
    ]


def _show_predictions(summary: dict[str, Any], result: SearchResult) -> None:
    """Prints what the cost model expected of each algorithm, and below it what was measured."""
    columns = ("way", ">batch, ms", ">READs", ">rounds", ">KiB", ">owners' CPU, us", ">shards", "")

    def row(name: str, ms: float, p: Prediction, remark: str) -> tuple[str, ...]:
        counts = (f"{p.reads:.1f}", f"{p.rounds:.1f}", f"{p.bytes / 1024:.1f}", f"{p.owner_cpu_s * 1e6:.1f}")
        return (name, f"{ms:,.2f}", *counts, f"{p.shards:.2f}", remark)

    rows = []
    for at, expected in enumerate(result.predictions):
        remark = "taken" if at == 0 else expected.why
        rows.append(row(f"{expected.algorithm}, expected", expected.seconds * 1e3, expected, remark))
    measured = Prediction(
        result.algorithm,
        len(result.ids) / summary["qps"],
        summary["reads_per_query"],
        summary["rounds_per_query"],
        summary["bytes_per_query"],
        0.0,
        summary["shards_per_query"],
    )
    cells = row(f"{result.algorithm}, measured", measured.seconds * 1e3, measured, "")
    rows.append((*cells[:5], "-", *cells[6:]))  # nobody measures the owners' CPU time from here
    output.print_table(columns, rows)
