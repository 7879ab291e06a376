"""Input tables: captures, encounters, kit batches, rolls."""
