"""Checks galleries and the installation, searches for canaries, and handles keys, logs, receipts and retention."""
