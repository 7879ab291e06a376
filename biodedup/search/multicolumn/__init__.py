"""Searches by several columns at once: face and fingers together."""
