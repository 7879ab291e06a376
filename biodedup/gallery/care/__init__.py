"""Maintenance tasks for a whole gallery: verification, repair, backup, encryption, copies, retention."""
