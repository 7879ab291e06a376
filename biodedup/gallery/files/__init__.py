"""The files of a gallery: file-system access, column files, vector codes, encryption, permissions."""
