"""What tests share: populations, pictures, galleries, faults, oracles. Test modules import from here and never from each other.

Programs here run from the repository's root: `python -m tests.support.attacks`.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository: child processes that import `tests.support` start here."""
GOLDEN = ROOT / "tests" / "golden"
"""One small gallery of every released format."""
