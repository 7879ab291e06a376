"""Commands of field kits."""
