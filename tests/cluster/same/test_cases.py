"""As tests/engine/test_cases.py, on a register."""

from tests.cluster.same.conftest import same
from tests.engine import test_cases as of_folders

globals().update(same(of_folders))
