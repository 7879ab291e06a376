"""Merges districts' registers into a central gallery, and undoes a merge."""
