"""biodedup: finds people who are enrolled twice.

It extracts templates from captures, stores them in a gallery, and compares every new encounter with all enrolled subjects. `__all__` and
`bd.jobs` are the public interface; everything else may change. A name's module is imported at the first use of the name, so that
`biodedup --help` does not load numba, FAISS and ONNX Runtime.
"""

import logging

import lazy_loader

__version__ = "0.3.0"
logging.getLogger("biodedup").addHandler(logging.NullHandler())  # the application configures logging

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*(set(__all__) - {"jobs"}), "__version__"])
