"""HOST:PORT, as owners are named."""

from __future__ import annotations

import re

from cotra_rdma.errors import InvalidInputError

_ADDRESS = re.compile(r"(?:tcp://)?(?:\[([^\s\[\]]+)\]|([^\s\[\]]+)):([0-9]{1,5})")
_SHOWN = 300  # characters of a bad address that an error repeats


def parse_address(address: str) -> tuple[str, int]:
    """Takes HOST:PORT (or [V6]:PORT) apart.

    Raises:
        InvalidInputError: it is something else, or HOST can be no name.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or not address.isprintable() or int(found[3]) > 65535:
        raise InvalidInputError(f"an address is HOST:PORT, not {address[:_SHOWN]!r}")
    host = found[1] or found[2]
    try:
        host.encode("idna")  # as sockets do
    except UnicodeError as error:
        raise InvalidInputError(f"an address is HOST:PORT, and {host[:_SHOWN]!r} is no host's name: {error}") from None
    return host, int(found[3])


def join_address(host: str, port: int) -> str:
    """HOST:PORT, or [V6]:PORT."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
