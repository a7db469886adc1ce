"""NodeDB's `VectorShardSeam`, and the algorithms behind it."""
