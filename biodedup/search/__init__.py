"""Search: scans every row, then re-ranks a few by everything that both sides have."""
