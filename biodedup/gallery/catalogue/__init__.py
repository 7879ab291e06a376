"""The catalogue: the database tables that record what a gallery holds."""
