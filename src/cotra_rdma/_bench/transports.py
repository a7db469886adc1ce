"""The names of the transports that `cotra bench` measures."""

from __future__ import annotations

import re

from cotra_rdma._native.channel import FabricModel
from cotra_rdma._owner.answers import TRANSPORTS
from cotra_rdma.errors import InvalidInputError

MIXED = "shm+rpc"
"""The transport of a collection whose shards alternate between shm and RPC."""
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_transport(text: str) -> tuple[str, FabricModel | None]:
    """Reads the name of a transport.

    The names are `verbs`, `shm`, `rpc`, `shm+rpc`, `local` for this process, and modelled fabrics such as
    `model:rtt=5us:gbit=100:mreads=10`.
    In a fabric, rtt is the round trip of a READ in us, ms or s, or 0.
    The bandwidth is gbit, in 10^9 bits a second, and mreads is 10^6 READs a second.

    Returns:
        The kind of the transport, and its fabric if it is modelled.

    Raises:
        InvalidInputError: the name is malformed.
    """
    kind, *settings = text.split(":")
    if kind in (*TRANSPORTS, MIXED, "local") and not settings:
        return kind, None
    values = {"rtt": 0.0, "gbit": 0.0, "mreads": 0.0}
    for setting in settings:
        name, _, value = setting.partition("=")
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(us|ms|s)?", value)
        if name not in values or found is None or bool(found[2]) != (name == "rtt" and value != "0"):
            break
        values[name] = float(found[1]) * _UNITS.get(found[2], 1.0)
    else:
        if kind == "model" and settings:
            return kind, FabricModel(values["rtt"], values["gbit"] * 1e9 / 8, values["mreads"] * 1e6)
    raise InvalidInputError(f"{text!r} is not verbs, shm, rpc, shm+rpc, local, or model:rtt=5us[:gbit=100][:mreads=10]")


def is_zero_rtt(transport: str | None) -> bool:
    """Returns whether a transport is a modelled fabric without a round trip."""
    fabric = None if transport is None else parse_transport(transport)[1]
    return fabric is not None and fabric.round_trip_s == 0
