"""Serves shards: answers requests, publishes memory regions, and keeps them while readers read."""
