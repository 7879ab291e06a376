"""Templates in and out of a gallery, in the formats of other programs."""
