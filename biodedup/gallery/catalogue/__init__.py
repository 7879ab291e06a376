"""The catalogue: the tables that say what a gallery holds."""
