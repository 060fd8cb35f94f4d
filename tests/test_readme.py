"""Every Python block of the README runs, in order, in one session. .ci/run runs the shell's."""

import ast
import re

import pytest
from conftest import ROOT

import rnn

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rnn, "CELLS", dict(rnn.CELLS))  # a block adds its own
    assert len(BLOCKS) == 4
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["forget"].shape == (35, 8, 256)
    assert names["logits"].shape == (4, 2) and len(names["written"]) == 4
    assert names["step"] == 50 and names["loss"] < 3
    assert "to be" in capsys.readouterr().out


FILES = re.findall(r"^\| `(\S+?)`", README, re.M)


def test_the_table_of_files_is_found():
    assert "rnn.py" in FILES and "csrc/" in FILES


@pytest.mark.parametrize("name", FILES)
def test_files_that_the_readme_names_exist(name):
    assert (ROOT / name).exists()


def test_a_first_reading_of_rnn_py_is_short():
    """What is not marked (skip): sections by their heading, functions by their docstring, and the
    rest of RNNBase by a comment. README gives the figures."""
    source = (ROOT / "rnn.py").read_text()
    lines = source.splitlines()
    ends = [k for k, line in enumerate(lines) if line.startswith(("# -----", "class "))]
    skipped = set()
    for k, line in enumerate(lines):
        if line.startswith("    # ") and "(skip)" in line:  # to the end of its class
            skipped.update(range(k, next(end for end in ends if end > k)))
        elif line.startswith("# ") and "(skip)" in line:  # to the end of its section
            skipped.update(range(k, next(e for e in ends if e > k and lines[e][0] == "#")))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "")[:6] == "(skip)":
            skipped.update(range(node.lineno - 1, node.end_lineno))
    marked, total = re.search(r"(\d+) of its ([\d,]+) lines", README).groups()
    assert abs(len(skipped) - int(marked)) <= 10
    assert abs(len(lines) - int(total.replace(",", ""))) <= 10
