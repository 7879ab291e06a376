"""The README and the docs say what is true: their Python examples run, and so do their commands where the output is shown.

What is run on a page (README.md, docs/**/*.md), from the top to the bottom, in one folder and one scope:

* blocks of `python`, unless the line before the block is `<!-- not run: REASON -->`;
* blocks of `console`: each `$ biodedup ...`; the lines behind it are its output, where `...` stands for any text, and a last line
  `(exit code N)` for a code that is not 0.

Commands in blocks of `sh` are not run; their options have to exist. Each page finds the files that Getting started makes.
"""

from __future__ import annotations

import doctest
import io
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import typer

import biodedup as bd
from biodedup import cli

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "reference" / "commands.md"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts and page != GENERATED),
]
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)\n(.*?)^```", re.M | re.S)
SAMPLES = ROOT / "docs" / "getting-started.md"
ARCHITECTURE = ROOT / "docs" / "design" / "architecture.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block that counts."""
    return [(language, text) for skipped, language, text in BLOCK.findall(page.read_text()) if not skipped]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_python(text: str, scope: dict[str, object], page: Path) -> None:
    exec(compile(text, name(page), "exec"), scope)


def run_console(text: str, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, wanted = part.partition("\n")
        code = re.search(r"^\(exit code (\d+)\)\n", wanted, re.M)
        wanted = wanted.replace(code[0], "") if code else wanted
        arguments = shlex.split(command)
        assert arguments[0] == "biodedup", f"{name(page)}: only biodedup is run in a console block: {command}"
        monkeypatch.setattr(sys, "argv", arguments)
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as ended:
            cli.main()
        told = f"{name(page)}: $ {command}\n{printed.getvalue()}"
        assert (ended.value.code or 0) == (int(code[1]) if code else 0), told
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(wanted, printed.getvalue(), flags), told


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(language in ("python", "console") for language, _ in blocks(page))], ids=name
)
def test_a_pages_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = next(text for language, text in blocks(SAMPLES) if language == "python")
    if page != SAMPLES:
        run_python(samples, {}, SAMPLES)
    scope: dict[str, object] = {"__name__": "__docs__"}
    for language, text in blocks(page):
        if language == "python":
            run_python(text, scope, page)
        elif language == "console":
            run_console(text, page, monkeypatch)


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- not run" in page.read_text()], ids=name)
def test_examples_that_are_not_run_are_python(page):
    for skipped, language, text in BLOCK.findall(page.read_text()):
        if skipped and language == "python":
            compile(text, name(page), "exec")


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Lines of `sh` blocks that call biodedup, and their words."""
    for language, text in blocks(page):
        if language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|;|\|", line.split(" #")[0]):
                    words = part.split()
                    if words and words[0] == "biodedup":
                        yield part.strip(), words[1:]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=name)
def test_the_commands_on_a_page_exist(page):
    for line, words in commands(page):
        command = typer.main.get_command(cli.app)
        words = [word.strip("[]") for word in words]
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands") or not words or words[0].startswith("--"), f"{name(page)}: {line}"
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known | {"--help"}, f"{name(page)}: {line}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        led_to = page.parent / target
        assert "://" in target or led_to.resolve() == GENERATED or led_to.exists(), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=name)
def test_files_and_names_that_a_page_mentions_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:biodedup|tests|benchmarks|models|docs|\.ci)/[\w./-]+)`", text):
        assert any(ROOT.glob(path)) or path in ("docs/_build", "benchmarks/results/"), f"{name(page)}: {path}"
    for owner, member in re.findall(r"`(?:bd\.)?(\w+)\.(\w+)\b(?!/)", text):
        owner = getattr(
            bd, {"engine": "Engine", "decision": "Decision", "policy": "Policy", "case": "Case"}.get(owner, owner), None
        )
        if isinstance(owner, type) and member not in ("py", "sqlite3"):
            known = hasattr(owner, member) or member in getattr(owner, "__dataclass_fields__", ())
            assert known, f"{name(page)}: {owner.__name__}.{member}"


@pytest.mark.parametrize("page", [page for page in PAGES if "`test_" in page.read_text()], ids=name)
def test_tests_that_a_page_names_exist(page):
    known = {
        found for file in (ROOT / "tests").rglob("*.py") for found in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert [named for named in re.findall(r"`(test_\w+)`", page.read_text()) if named not in known] == []


def test_the_architecture_lists_every_package_and_real_modules():
    text = ARCHITECTURE.read_text()
    for package in (ROOT / "biodedup").rglob("__init__.py"):
        folder = package.parent.relative_to(ROOT / "biodedup").as_posix()
        assert folder == "." or f"| `{folder}` |" in text, folder
    for module in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / "biodedup" / module).exists(), module


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_line_is_too_long(page):
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 140 and not line.startswith("|")] == []
    if page.name == "README.md":
        assert len(lines) <= 180 and max(map(len, lines)) <= 140
