"""Searches in several columns at once, such as the face and fingers."""
