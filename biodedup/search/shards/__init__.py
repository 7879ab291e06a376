"""Shards: parts of a gallery that are searched separately."""
