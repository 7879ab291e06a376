"""Turns captures into samples: picture formats, faces, fingers, and their quality gates."""
