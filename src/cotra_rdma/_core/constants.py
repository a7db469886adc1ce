"""Names of metrics and vector types, in the order of their numbers in images and in C."""

from __future__ import annotations

METRICS = ("l2", "ip", "cosine")
VECTOR_TYPES = ("float32", "float16", "uint8")
