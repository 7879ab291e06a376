"""The native index engine: a scan over quantised vectors, and exact refinement."""
