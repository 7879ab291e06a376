"""Scores in decibels: calibration tables, their fitting, the fusion of several captures."""
