"""The messages of owners, readers and builders: the envelope, its payloads byte for byte, and RPC. It needs no C.

docs/reference/wire.md describes the bytes.
"""

import os

# Our errors and our log say what went wrong. Whoever wants gRPC's own log sets this variable.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
