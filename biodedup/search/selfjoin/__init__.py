"""The self-join of a gallery: finds all pairs of rows that score at least a threshold."""
