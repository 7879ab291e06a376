"""Fingerprints: segmentation, enhancement, minutiae, the quality gate."""
