"""Comparison of two prints by their minutiae."""
