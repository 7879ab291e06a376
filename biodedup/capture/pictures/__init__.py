"""Files of pictures: formats, containers, pixel formats, resolution."""
