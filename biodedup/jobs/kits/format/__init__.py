"""Reads and writes the file format of field kits' batches: keys, encryption, records, signatures. `KIT.md` describes it byte by byte."""
