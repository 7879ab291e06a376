"""Exports galleries in file formats of other programs (Parquet, CSV, FAISS), and loads them again."""
