"""Measures error rates on labelled data, and fits calibrations."""
