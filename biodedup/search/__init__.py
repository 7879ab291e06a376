"""Search: scans every row by its embeddings, then compares the best candidates by all captures."""
