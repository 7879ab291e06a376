"""Shards: a gallery in pieces, each searched on its own."""
