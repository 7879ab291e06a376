"""The self-join: every row of a gallery compared with every other."""
