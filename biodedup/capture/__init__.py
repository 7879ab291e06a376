"""Turns captures into samples: decoding, face and finger processing, quality gates."""
