"""biodedup: finds a person enrolled twice.

Captures become templates, templates a gallery, and every new encounter is compared with everybody in it. `__all__` is
the public interface; everything else may change. A name's module is imported when the name is first used, so that
`biodedup --help` need not load numba, FAISS and ONNX Runtime.
"""

import lazy_loader

__version__ = "0.3.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*__all__, "__version__"])
