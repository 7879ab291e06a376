"""Shards: parts of a gallery that are searched separately, by the native engine or by FAISS."""
