"""The file format of batches: keys, encryption, records, signatures. `KIT.md` describes it byte by byte."""
