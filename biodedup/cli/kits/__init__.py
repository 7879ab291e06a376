"""Defines the commands of field kits: machines of teams that capture without a network."""
