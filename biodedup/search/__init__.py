"""Finding candidates: scan every row, rescore a few with everything that both sides have."""
