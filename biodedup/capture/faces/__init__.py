"""Faces: detection, alignment, the quality gate."""
