"""Error rates on labelled data, and calibration."""
