"""Rows of a gallery: sealed segments on disk, and the tail in memory."""
