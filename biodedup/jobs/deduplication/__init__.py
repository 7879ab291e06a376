"""Finds duplicates in a folder of images or in a gallery, and audits a roll (an office's list of people)."""
