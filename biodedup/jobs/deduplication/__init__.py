"""Duplicates in a folder of images or in a gallery, and audits of a roll."""
