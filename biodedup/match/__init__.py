"""Exact comparison: similarities, their calibration, their fusion, and the decision."""
