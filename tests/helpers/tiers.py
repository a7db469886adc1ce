"""A tier that cannot run here is skipped, or fails where `--require` names it."""

from __future__ import annotations

from typing import NoReturn

import pytest


def cannot_run(config: pytest.Config, tier: str, why: str) -> NoReturn:
    """Skips, saying what is missing; fails under `--require=tier`."""
    if tier in config.getoption("--require"):
        pytest.fail(f"--require={tier}: {why}", pytrace=False)
    pytest.skip(why)
