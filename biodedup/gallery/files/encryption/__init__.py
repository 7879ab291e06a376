"""Encryption of a gallery: keys, files, databases, and the secret transform of embeddings."""
