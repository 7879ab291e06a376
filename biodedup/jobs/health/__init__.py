"""`doctor`: the installation, a gallery, and canaries."""
