"""k-means, plain and with shards of nearly equal size."""
