"""How the cost of a search grows with shards and rows: measured, and predicted."""
