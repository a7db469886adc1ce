"""How many bytes a second an identity may move: a second's worth ahead, and no more."""

from __future__ import annotations

import pytest

from cotra_rdma import BusyError
from cotra_rdma._owner.rates import Rates


def test_a_rate_is_kept() -> None:
    now = 0.0
    rates, moved = Rates(clock=lambda: now), 0
    for second in range(100):
        now = second
        while True:
            try:
                rates.check(("a",))
            except BusyError:
                break
            rates.charge(("a",), 300, 1000)
            moved += 300
        rates.check(("b",))
    assert 98_000 <= moved <= 102_000


def test_what_was_not_moved_is_not_saved_up() -> None:
    now = 0.0
    rates = Rates(clock=lambda: now)
    rates.charge(("a",), 1000, 1000)
    now = 1000.0
    rates.charge(("a",), 2500, 1000)
    with pytest.raises(BusyError, match=r"a has moved .*: try again in 1.5 s"):
        rates.check(("a",))
    now = 1001.5
    rates.check(("a",))
