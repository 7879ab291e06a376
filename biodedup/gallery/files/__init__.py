"""Files of a gallery: the file system, column files, vector codes, private permissions."""
