"""One shard: built, saved, opened, and searched in place."""
