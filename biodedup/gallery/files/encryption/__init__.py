"""Encryption of a gallery's files and databases."""
