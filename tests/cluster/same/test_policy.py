"""As tests/engine/test_policy.py, on a register."""

from tests.cluster.same.conftest import same
from tests.engine import test_policy as of_folders

globals().update(same(of_folders))
