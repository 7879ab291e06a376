"""Search: scans every row, then re-ranks a few by all captures that both sides have."""
