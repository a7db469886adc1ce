"""What `cotra info` shows of an inspection: an object for `--json`, or tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from rich.markup import escape

from cotra_rdma._collection.owner_probe import OwnerStatus
from cotra_rdma._collection.owners_file import OWNERS
from cotra_rdma._diagnose.graph_stats import degree_range
from cotra_rdma._diagnose.inspection import Inspection, ShardReport
from cotra_rdma.cli import output

_BARS, _BAR_WIDTH, _TOP = 16, 40, 3


def report(found: Inspection) -> dict[str, Any]:
    """Makes the object that `--json` prints."""
    manifest = found.collection
    return {
        "collection": None
        if manifest is None
        else {name: value for name, value in manifest.summary().items() if name != "shards"},
        "count": found.count,
        "balance": found.balance,
        "cross_share": found.cross_share,
        "graph_ids": [_hex(graph) for graph in found.graph_ids],
        "shards": [_shard(shard) for shard in found.shards],
        "problems": found.problems,
        "unserved": found.unserved,
    }


def _shard(shard: ShardReport) -> dict[str, Any]:
    header, graph = shard.info, shard.graph
    return {
        "number": shard.number,
        "name": shard.name,
        "here": shard.here,
        "count": shard.count,
        "image_bytes": shard.image_bytes,
        "bytes_per_vector": _per_vector(shard),
        "generation": shard.generation,
        "header": None
        if header is None
        else {
            "format_version": header.format_version,
            "dim": header.dim,
            "metric": header.metric,
            "vector_type": header.vector_type,
            "M": header.M,
            "degree": header.degree,
            "ef_construction": header.ef_construction,
            "deleted": header.deleted_count,
            "record_bytes": header.record_bytes,
            "ivf_bytes": header.ivf_bytes,
            "upper_nodes": header.upper_count,
            "max_level": header.max_level,
            "image_checksum": _hex(header.image_checksum),
            "graph_id": _hex(header.graph_id),
            "graph_base": header.graph_base,
            "graph_count": header.graph_count,
        },
        "links": None if graph is None else graph.links,
        "cross_share": None if graph is None else graph.cross_share,
        "links_to": None if graph is None else graph.links_to.tolist(),
        "links_elsewhere": None if graph is None else graph.links_elsewhere,
        "degrees": None if graph is None else graph.degrees.tolist(),
        "levels": None if graph is None else graph.levels.tolist(),
        "owners": [_owner(shard, owner) for owner in shard.owners],
    }


def _owner(shard: ShardReport, owner: OwnerStatus) -> dict[str, Any]:
    answers = owner.serves is not None
    return {
        "address": owner.address,
        "answers": answers,
        "latency_us": owner.latency_s * 1e6 if answers else None,
        "transports": list(owner.transports),
        "generation": None if owner.serves is None else owner.serves.generation,
        "problem": owner.problem or shard.misfits.get(owner.address, ""),
    }


def _per_vector(shard: ShardReport) -> float | None:
    return shard.image_bytes / shard.count if shard.image_bytes and shard.count else None


def _hex(value: int) -> str:
    """Formats 64 bits as text, because many readers of JSON cannot hold such a number exactly."""
    return f"{value:#018x}"


def show(found: Inspection) -> None:
    """Prints an inspection as tables, then its problems."""
    output.print_table(
        ("shard", "name", ">vectors", ">deleted", ">size", ">B/vector", ">generation", ">format", ">first node"),
        (
            (
                str(shard.number),
                escape(shard.name) + ("" if shard.here or not found.collection else " (not here)"),
                _number(shard.count),
                _number(None if shard.info is None else shard.info.deleted_count),
                "-" if shard.image_bytes is None else output.human_bytes(shard.image_bytes),
                _number(_per_vector(shard)),
                _number(shard.generation),
                _number(None if shard.info is None else shard.info.format_version),
                _number(None if shard.info is None else shard.info.graph_base),
            )
            for shard in found.shards
        ),
    )
    read = [shard for shard in found.shards if shard.graph is not None]
    if read:
        _show_graphs(read)
    asked = [(shard, owner) for shard in found.shards for owner in shard.owners]
    if asked:
        _show_owners(asked)
    _show_summary(found)
    for problem in found.problems:
        output.out.print(f"[bold red]does not fit:[/] {escape(problem)}", soft_wrap=True)
    for why in found.unserved:
        output.out.print(f"[bold red]not served:[/] {escape(why)}", soft_wrap=True)
    if found.collection is not None and any(owner.problem for _, owner in asked):
        output.out.print(
            f"[yellow]owners that do not answer[/] stay in {OWNERS} until `cotra serve` is started again on their "
            "host; those of another host may be deleted there.",
            soft_wrap=True,
        )


def _show_graphs(read: list[ShardReport]) -> None:
    rows, total = [], np.zeros(max(len(shard.graph.degrees) for shard in read if shard.graph), np.int64)
    for shard in read:
        graph = shard.graph
        assert graph is not None
        total[: len(graph.degrees)] += graph.degrees
        least, median, most = degree_range(graph.degrees)
        rows.append(
            (
                str(shard.number),
                f"{graph.links:,}",
                f"{graph.cross_share:.1%}",
                _top(shard),
                f"{least}/{median:g}/{most}",
                ", ".join(f"{n:,}" for n in graph.levels[1:]) or "none",
            )
        )
    columns = (
        "shard",
        ">links",
        ">across",
        "most of them into shard",
        ">degree, min/median/max",
        "upper nodes by level",
    )
    output.print_table(columns, rows)
    output.print_table((">links of a node", ">nodes", ""), _histogram(total))


def _top(shard: ShardReport) -> str:
    """Returns the shards that most links lead into, with their shares of all links."""
    graph = shard.graph
    assert graph is not None
    into = graph.links_to.copy()
    into[shard.number] = 0
    best = [at for at in np.argsort(-into, kind="stable")[:_TOP] if into[at]]
    told = [f"{at} ({into[at] / graph.links:.1%})" for at in best]
    if graph.links_elsewhere:
        told.append(f"others ({graph.links_elsewhere / graph.links:.1%})")
    return ", ".join(told)


def _histogram(degrees: npt.NDArray[np.int64]) -> list[tuple[str, str, str]]:
    """Makes rows of degrees, nodes and a bar, from the least degree to the largest.

    A row has several degrees if there are many.
    """
    least, _, most = degree_range(degrees)
    step = -(-(most + 1 - least) // _BARS)
    lows = range(least, most + 1, step)
    counts = [int(degrees[low : min(low + step, most + 1)].sum()) for low in lows]
    rows = []
    for low, count in zip(lows, counts, strict=True):
        high = min(low + step - 1, most)
        bar = "█" * round(_BAR_WIDTH * count / max(counts)) or ("▏" if count else "")
        rows.append((str(low) if low == high else f"{low}-{high}", f"{count:,}", bar))
    return rows


def _show_owners(asked: list[tuple[ShardReport, OwnerStatus]]) -> None:
    output.print_table(
        ("shard", "owner", "answers", ">control call", "offers", ">generation"),
        (
            (
                str(shard.number),
                escape(owner.address),
                escape(f"no answer: {owner.problem}" if owner.problem else shard.misfits.get(owner.address) or "yes"),
                "-" if owner.serves is None else f"{owner.latency_s * 1e6:,.0f} us",
                ", ".join(owner.transports) or "-",
                "-" if owner.serves is None else str(owner.serves.generation),
            )
            for shard, owner in asked
        ),
    )


def _show_summary(found: Inspection) -> None:
    manifest = found.collection
    rows = [("vectors", f"{found.count:,} in {len(found.shards)} shard{'s' if len(found.shards) > 1 else ''}")]
    if manifest is not None:
        rows += [
            ("built with", f"dim {manifest.dim}, {manifest.metric}, M {manifest.M}, generation {manifest.generation}"),
            ("partition", manifest.partition),
            ("graph", "one over all shards" if manifest.graph == "global" else "one in each shard"),
        ]
    rows += [("graph id", _hex(graph)) for graph in found.graph_ids if graph]
    if found.balance is not None:
        rows.append(("balance", f"{found.balance:.3f}: the largest shard over the mean"))
    if found.cross_share is not None:
        rows.append(("links across shards", f"{found.cross_share:.1%}"))
    if any(shard.owners for shard in found.shards):
        rows.append(("shards served", f"{sum(shard.served for shard in found.shards)} of {len(found.shards)}"))
    elif manifest is not None:
        rows.append(("shards served", "none, as far as owners.json says"))
    output.print_table(("", ""), rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
