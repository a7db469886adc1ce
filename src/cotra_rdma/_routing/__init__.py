"""Which shards a query needs: coarse tables, and Compass over them."""
