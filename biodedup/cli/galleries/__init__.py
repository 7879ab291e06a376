"""Commands on a gallery: looking, moving, keys, policy."""
