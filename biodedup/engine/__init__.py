"""The engine: the public class, and one module a step of the path from captures to a decision."""

from biodedup.engine.engine import Engine, compare

__all__ = ["Engine", "compare"]
