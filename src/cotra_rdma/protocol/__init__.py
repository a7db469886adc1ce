"""What owners and readers say to each other: the envelope, its payloads byte for byte, and RPC. Needs no C."""

import os

os.environ.setdefault(
    "GRPC_VERBOSITY", "NONE"
)  # what goes wrong is in our errors and our log; set it to see gRPC's own
