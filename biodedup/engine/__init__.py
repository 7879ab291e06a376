"""The engine: the public class `Engine`, and one module for each step from captures to a decision."""

from biodedup.engine.engine import Engine, compare

__all__ = ["Engine", "compare"]
