"""As tests/engine/test_fresh_gallery.py, on a register."""

from tests.cluster.same.conftest import same
from tests.engine import test_fresh_gallery as of_folders

globals().update(same(of_folders))
