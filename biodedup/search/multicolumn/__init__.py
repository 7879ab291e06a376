"""Searches in several columns at once: face and fingers together."""
