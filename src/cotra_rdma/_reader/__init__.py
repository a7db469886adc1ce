"""Searches of shards that others own: connections, plans, engines and what happens when an owner dies."""
