"""As tests/engine/test_subjects.py, on a register."""

from tests.cluster.same.conftest import same
from tests.engine import test_subjects as of_folders

globals().update(same(of_folders))
