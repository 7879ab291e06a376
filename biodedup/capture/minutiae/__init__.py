"""Minutiae records: their layouts, reading, writing, checks."""
