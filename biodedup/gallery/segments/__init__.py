"""The rows of a gallery: segments (sealed rows, on disk) and the tail (the newest rows, in memory)."""
