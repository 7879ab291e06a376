"""Merging registers into a central gallery."""
