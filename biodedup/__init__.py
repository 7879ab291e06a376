"""biodedup: finds people who are enrolled twice.

It extracts templates from captures, stores them in a gallery, and compares every new encounter with all enrolled subjects. `__all__` is
the public interface, with the jobs of `bd.jobs`; everything else may change. The module of a name is imported when the name is first used, so that
`biodedup --help` does not load numba, FAISS and ONNX Runtime.
"""

import logging

import lazy_loader

__version__ = "0.3.0"
logging.getLogger("biodedup").addHandler(logging.NullHandler())  # a program chooses where messages go

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*(set(__all__) - {"jobs"}), "__version__"])
