"""The house as a whole: who may import whom, what stands at the top level, docstrings, lengths, examples that run."""

import ast
import doctest
import importlib
import os
import subprocess

import pytest

from conftest import ROOT

ROOMS = ["run", "kernels", "model", "rollout", "world", "prefmodel", "eval", "sppo", "lsp"]  # bottom first
ALLOWED = {"README.md", "requirements.txt", "LICENSE", ".gitignore", ".ci", "assets", "tests"} | {room + ".py"
    for room in ROOMS}
PRESENT = [room for room in ROOMS if os.path.exists(os.path.join(ROOT, room + ".py"))]


def tree(room):
    with open(os.path.join(ROOT, room + ".py")) as file:
        return ast.parse(file.read())


def imports(room):
    """Every module named in an import statement of the file, those inside functions included."""
    names = set()
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_the_rooms_are_here():
    assert PRESENT[:8] == ROOMS[:8]


@pytest.mark.parametrize("room", PRESENT)
def test_a_file_imports_only_rows_above_it(room):
    above = set(ROOMS[:ROOMS.index(room)]) - ({"sppo"} if room == "lsp" else set())  # the two methods never meet
    assert imports(room) & set(ROOMS) <= above


def test_run_imports_only_torch_and_the_standard_library():
    """transformers and tqdm are imported inside the functions that use them: `--help` must not wait for them."""
    top = {name for node in tree("run").body if isinstance(node, (ast.Import, ast.ImportFrom))
           for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])}
    assert not any(name.split(".")[0] in ("transformers", "tqdm", "numpy", "matplotlib") for name in top)
    assert "torch" in top


def test_nothing_else_stands_at_the_top_level():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:  # a copy without git, e.g. an unpacked archive
        names = set(os.listdir(ROOT)) - {"out", "__pycache__", ".pytest_cache", ".git", ".venv"}
    else:
        names = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert names <= ALLOWED


@pytest.mark.parametrize("room", PRESENT)
def test_every_public_function_and_class_has_a_docstring(room):
    module = tree(room)
    assert ast.get_docstring(module)
    public = [node for node in module.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("room", PRESENT)
def test_functions_stay_under_sixty_lines(room):
    """All but `main`, the one long block that holds the algorithm in its order."""
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree(room))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert {name: n for name, n in long.items() if n > 60 and name != "main"} == {}


@pytest.mark.parametrize("room", ["run", "kernels", "world", "prefmodel", "eval", "sppo", "lsp"])
def test_examples_in_docstrings(room):
    result = doctest.testmod(importlib.import_module(room))
    assert result.failed == 0 and (result.attempted > 0 or room in ("run", "eval", "sppo"))
