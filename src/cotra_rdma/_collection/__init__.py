"""A collection on disk: its manifest, its owners' addresses, and what these answer."""
