"""What owners and readers say to each other: the envelope, its payloads byte for byte, and RPC. Needs no C."""
