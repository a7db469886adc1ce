"""Addresses of owners: HOST:PORT, or [V6]:PORT."""

from __future__ import annotations

import re

from cotra_rdma.errors import InvalidInputError

_ADDRESS = re.compile(r"(?:tcp://)?(?:\[([^\s\[\]]+)\]|([^\s\[\]]+)):([0-9]{1,5})")
_SHOWN = 300  # the most characters of a bad address that an error repeats


def parse_address(address: str) -> tuple[str, int]:
    """Splits HOST:PORT or [V6]:PORT into host and port.

    Raises:
        InvalidInputError: it is neither, or HOST cannot be the name of a host.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or not address.isprintable() or int(found[3]) > 65535:
        raise InvalidInputError(f"an address is HOST:PORT, not {address[:_SHOWN]!r}")
    host = found[1] or found[2]
    try:
        host.encode("idna")  # a socket encodes the name so when it connects
    except UnicodeError as error:
        raise InvalidInputError(f"an address is HOST:PORT, and {host[:_SHOWN]!r} is no host's name: {error}") from None
    return host, int(found[3])


def join_address(host: str, port: int) -> str:
    """Joins host and port to HOST:PORT, or to [V6]:PORT."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
