"""Captures into samples: formats, the face, the finger, and their quality gates."""
