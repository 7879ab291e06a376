"""As tests/engine/test_engine.py, on a register."""

from tests.cluster.same.conftest import same
from tests.engine import test_engine as of_folders

OF_FOLDERS = {
    "test_a_second_writer_is_told_who_holds_the_gallery",
    "test_foreign_folders_and_files_are_not_galleries",
}

globals().update(same(of_folders, OF_FOLDERS))
