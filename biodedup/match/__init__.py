"""Exact comparison of templates: raw scores, their calibration, their fusion, and the decision rules."""
