"""Searches a register's segments in other processes: Ray actors, each with a replica of a group of segments."""
