"""How the tests are laid out: a folder a package; what they share lies in tests/support."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT

TESTS = ROOT / "tests"


def imported(content: str) -> set[str]:
    """Every module that a file's text imports, with the names taken from it, as dotted paths."""
    found = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def reached(content: str, names: str) -> list[str]:
    """Private attributes of an object of one of these names that a file's text takes, in the scripts that it starts, too."""
    return re.findall(rf"\b(?:{names})\._(?!_)\w+", content)


def of_tests(modules: set[str]) -> set[str]:
    """Those that are of a test module or of a conftest."""
    return {name for name in modules if any(part.startswith(("test_", "conftest")) for part in name.split("."))}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_a_test_module(path: Path):
    assert of_tests(imported(path.read_text())) == set()


def test_an_import_of_a_test_module_is_seen_wherever_it_stands():
    content = (
        "from tests.x import test_a\ndef f():\n    import tests.test_b\n    from conftest import people\nimport testing"
    )
    assert of_tests(imported(content)) == {"tests.x.test_a", "tests.test_b", "conftest.people"}


def test_every_folder_of_tests_is_a_package_of_the_library_or_is_named_here():
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    packages = {path.parent.name for path in (ROOT / "biodedup").glob("*/__init__.py")}
    assert folders - packages == {"project"}
    assert all((TESTS / folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize(
    ("folder", "names"), [("tests", "engine|gallery|comparer|searcher"), ("benchmarks", "engine|gallery")]
)
def test_what_is_needed_of_an_engine_or_its_parts_has_a_public_name_or_is_in_biodedup_testing(folder, names):
    found = {str(path.relative_to(ROOT)): reached(path.read_text(), names) for path in (ROOT / folder).rglob("*.py")}
    assert {name: attributes for name, attributes in found.items() if attributes} == {}


@pytest.mark.slow
def test_files_that_a_modules_docstring_names_exist():
    modules = sorted((ROOT / "biodedup").rglob("*.py"))
    for path in modules:
        for name in re.findall(r"[\w/]+\.py\b", ast.get_docstring(ast.parse(path.read_text())) or ""):
            known = (ROOT / name).exists() or any(module.as_posix().endswith(f"/{name}") for module in modules)
            assert known, f"{path.relative_to(ROOT)} names {name}, which does not exist"


def test_a_private_attribute_of_an_engine_is_seen():
    name = "engine"  # this file is looked through as well
    content = f"{name}._gallery.seal()\nx = ({name}._searcher)\n{name}.__exit__(None)\n{name}.policy._x"
    assert len(reached(content, name)) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.onnx")), ids=lambda path: path.name)
def test_shipped_weights_hold_no_stack_trace_of_the_machine_that_made_them(path: Path):
    assert b'File "/' not in path.read_bytes()
