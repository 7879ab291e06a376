"""As tests/engine/test_encounters.py, on a register."""

from tests.cluster.same.conftest import same
from tests.engine import test_encounters as of_folders

globals().update(same(of_folders))
