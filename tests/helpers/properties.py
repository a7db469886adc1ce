"""Hypothesis with fixed seeds: the same examples every time, none remembered."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def fixed(max_examples: int) -> settings:
    """Settings for `max_examples` examples that are the same in every run."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
