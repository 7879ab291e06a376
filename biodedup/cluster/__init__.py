"""A register on several machines: its catalogue is in PostgreSQL, its segments are on a shared file system; `Engine` is the same."""
