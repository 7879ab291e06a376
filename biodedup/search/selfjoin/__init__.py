"""Joins: every row of a gallery compared with every other."""
