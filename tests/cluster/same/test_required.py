"""As tests/engine/test_required.py, on a register."""

from tests.cluster.same.conftest import same
from tests.engine import test_required as of_folders

globals().update(same(of_folders))
