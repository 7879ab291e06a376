"""Shards of a register in other processes: actors of Ray that search replicated groups of sealed segments."""
