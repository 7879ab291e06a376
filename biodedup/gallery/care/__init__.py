"""Care of a gallery: checks, repair, backup, copies."""
