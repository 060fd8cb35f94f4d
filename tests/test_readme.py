"""Every Python block of the READMEs runs, in order, and prints what stands below it. .ci/run runs
the shell's."""

import re

import pytest
from conftest import ROOT

import rnn

README = (ROOT / "README.md").read_text()
FILES = [(page, name) for page in ("README.md", "csrc/README.md", "tests/README.md")
         for name in re.findall(r"^\| `(\S+?)`", (ROOT / page).read_text(), re.M)
         if "." in name or name.endswith("/")]


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rnn, "CELLS", dict(rnn.CELLS))  # a block adds its own
    example, cell = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    promised = re.search(r"```python.*?```text\n(.*?)```", README, re.S)[1].splitlines()
    for ours, theirs in zip(printed, promised, strict=True):
        if re.fullmatch(r"\d+ [\d.]+", theirs):  # a perplexity: processors round differently
            assert float(ours.split()[1]) == pytest.approx(float(theirs.split()[1]), rel=0.1)
        else:
            assert ours == theirs
    exec(compile(cell, "README.md", "exec"), names)
    assert names["output"].shape == (35, 8, 256) and names["state"].shape == (2, 8, 256)


def test_the_tables_of_files_are_found():
    assert ("README.md", "rnn.py") in FILES and ("csrc/README.md", "lstm.h") in FILES


@pytest.mark.parametrize("page,name", FILES)
def test_files_that_a_readme_names_exist(page, name):
    assert (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists()


def test_the_budgets_of_lines_are_kept():
    for name, most in (("README.md", 150), ("rnn.py", 650), ("train_shakespeare.py", 400),
                       ("tests/test_rnn.py", 120)):
        assert len((ROOT / name).read_text().splitlines()) <= most, name
    assert "(skip)" not in (ROOT / "rnn.py").read_text()
