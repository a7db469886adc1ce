"""How the cost of a search grows with shards and vectors: measured and predicted."""
