"""The package's shape: layers, formatting, and sizes that a reader can take in.

Tokens are Python's, without comments, docstrings, line ends and indentation: they do not change
with the formatter, so the ceiling cannot be met by packing.
"""

import ast
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

from qlutils.paths import PACKAGE, ROOT

TOKENS = 100_000  # to be lowered, not raised
TOKENS_A_LINE = 10  # of lines that hold code
FUNCTION_LINES = 40
COLUMNS = 100
FREE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FILES = sorted(PACKAGE.rglob("*.py"))
assert FILES


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def docstring_lines(file):
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            found.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def code_tokens(file):
    texts = docstring_lines(file)
    with tokenize.open(file) as stream:
        for token in tokenize.generate_tokens(stream.readline):
            text = token.type == tokenize.STRING and token.start[0] in texts
            if token.type not in FREE and not text:
                yield token


def imports_package(node):
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").split(".")[0] == "qlutils"
    return isinstance(node, ast.Import) and any("qlutils" in one.name for one in node.names)


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["lint-imports", "--no-cache"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_the_linters_find_nothing(command):
    command = [Path(sys.executable).with_name(command[0]), *command[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_is_small_and_its_lines_are_not_packed():
    tokens, lines = 0, 0
    for file in FILES:
        found = list(code_tokens(file))
        tokens += len(found)
        covered = [range(token.start[0], token.end[0] + 1) for token in found]
        lines += len({line for part in covered for line in part})
    assert tokens <= TOKENS
    assert tokens <= TOKENS_A_LINE * lines


def test_functions_and_lines_are_short():
    long = []
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= FUNCTION_LINES:
                long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if len(line) > COLUMNS:
                long.append(f"{file.relative_to(ROOT)}:{number}")
    assert not long


def test_no_function_hides_an_import_of_the_package():
    hidden = []
    for file in FILES:
        for function in ast.walk(tree(file)):
            if isinstance(function, FUNCTIONS):
                nodes = filter(imports_package, ast.walk(function))
                hidden += [f"{file.relative_to(ROOT)}:{node.lineno}" for node in nodes]
    assert not hidden
