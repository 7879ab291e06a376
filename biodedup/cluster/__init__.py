"""A register on several machines: a PostgreSQL catalogue and segments on a shared file system, under the same `Engine`."""
