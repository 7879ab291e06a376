"""The kernels of the native index engine: scans over quantised vectors, and exact comparison."""
