"""The house as a whole: who may import whom, examples that run, and (marked `house`) what stands where and how long it
is."""

import ast
import doctest
import glob
import importlib
import os
import subprocess
import sys

import pytest

from conftest import ROOT

# Bottom first. benchmarks/ is one row: its files may import each other. Those about speed belong to bench.py.
ROOMS = ["flags", "files", "parallel", "run", "kernels_triton", "kernels", "checkpoints", "lora", "model", "memory",
         "rollout", "chat", "world", "challenger", "table", "games", "pairrm", "prefmodel", "winrate", "plots",
         "benchmarks", "eval", "sppo", "lsp", "bench"]
SPEED = {"benchmarks/timing.py", "benchmarks/steps.py", "benchmarks/growth.py", "benchmarks/gpu.py"}
TOP_LEVEL = {"README.md", "CONTRIBUTING.md", "CITATION.cff", "requirements.txt", "LICENSE", ".gitignore", ".ci",
             ".github", "assets", "docs", "tests", "benchmarks"} | {room + ".py" for room in ROOMS}
FILES = sorted(os.path.relpath(path, ROOT) for pattern in ("*.py", "benchmarks/*.py")
               for path in glob.glob(os.path.join(ROOT, pattern)))


def room_of(file):
    return "bench" if file in SPEED else file.split(os.sep)[0].removesuffix(".py")


def tree(file):
    with open(os.path.join(ROOT, file)) as source:
        return ast.parse(source.read())


def imports(file):
    """Every module named in an import statement of the file, those inside functions included."""
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_every_room_has_its_row():
    assert {room_of(file) for file in FILES} == set(ROOMS)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_rows_above_it(file):
    room = room_of(file)
    above = set(ROOMS[:ROOMS.index(room)]) | ({"benchmarks"} if room == "benchmarks" else set())
    if room in ("sppo", "lsp"):                     # the two methods never meet, and need no benchmark
        above -= {"sppo", "eval", "benchmarks"}
    assert imports(file) & set(ROOMS) <= above


def test_run_imports_only_torch_and_the_standard_library():
    """transformers and tqdm are imported inside the functions that use them: `--help` must not wait for them."""
    top = {name for node in tree("run.py").body if isinstance(node, (ast.Import, ast.ImportFrom))
           for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])}
    assert not any(name.split(".")[0] in ("transformers", "tqdm", "numpy", "matplotlib") for name in top)
    assert "torch" in top


def test_help_waits_for_nothing_but_torch(tmp_path):
    """What takes seconds to import (transformers) or draws (matplotlib) is imported where it is used."""
    code = ("import runpy, sys\nfor script in sys.argv[1:]:\n    sys.argv = [script, '--help']\n"
            "    try:\n        runpy.run_path(script, run_name='__main__')\n    except SystemExit:\n        pass\n"
            "print([name for name in ('transformers', 'tokenizers', 'matplotlib', 'huggingface_hub', 'datasets') "
            "if name in sys.modules])")
    scripts = [os.path.join(ROOT, script) for script in ("sppo.py", "lsp.py", "eval.py")]
    done = subprocess.run([sys.executable, "-c", code, *scripts], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0 and all(f"usage: {script}" in done.stdout for script in ("sppo.py", "lsp.py"))
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-500:]


@pytest.mark.parametrize("file", FILES)
def test_examples_in_docstrings(file):
    if room_of(file) == "kernels_triton":
        pytest.importorskip("triton", reason="needs the package triton")
    result = doctest.testmod(importlib.import_module(file.removesuffix(".py").replace(os.sep, ".")))
    assert result.failed == 0


def test_there_are_examples():
    with_examples = {room_of(file) for file in FILES if ">>>" in open(os.path.join(ROOT, file)).read()}
    assert with_examples >= {"run", "kernels", "model", "rollout", "chat", "world", "games", "prefmodel", "benchmarks",
                             "lsp"}


# ---------------------------------------------------------------------------------------------------------------------
# house rules: `pytest --house -m house`


@pytest.mark.house
def test_nothing_else_stands_at_the_top_level():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:  # a copy without git, e.g. an unpacked archive
        names = set(os.listdir(ROOT)) - {"out", "__pycache__", ".pytest_cache", ".git", ".venv"}
    else:
        names = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert names <= TOP_LEVEL


@pytest.mark.house
@pytest.mark.parametrize("file", FILES)
def test_every_public_function_and_class_has_a_docstring(file):
    module = tree(file)
    assert ast.get_docstring(module)
    public = [node for node in module.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.house
@pytest.mark.parametrize("file", FILES)
def test_functions_stay_under_sixty_lines_and_files_under_eight_hundred(file):
    """Main loops too: a capability that makes a loop harder to follow is not finished."""
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree(file))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert {name: n for name, n in long.items() if n > 60} == {}
    lines = open(os.path.join(ROOT, file)).read().splitlines()
    assert len(lines) <= 800 and [n for n, line in enumerate(lines, 1) if len(line) > 120] == []


@pytest.mark.house
def test_the_readme_is_short():
    text = open(os.path.join(ROOT, "README.md")).read()
    assert text.count("\n") <= 250 and len(text.split()) <= 2500


@pytest.mark.house
@pytest.mark.parametrize("name", sorted(glob.glob("docs/*.md", root_dir=ROOT)))
def test_a_docs_page_begins_with_what_it_is_for(name):
    title, empty, first, *_ = open(os.path.join(ROOT, name)).read().splitlines()
    assert title.startswith("# ") and not empty and first and not first.startswith(("#", "|", "-", "`"))
