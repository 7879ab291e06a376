"""Field kits: batch files that a team captures offline and the centre ingests."""
