"""Every Python block of the README runs, in order, in one session. .ci/run runs the shell's."""

import re

import pytest
from conftest import ROOT

import rnn

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


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


FILES = re.findall(r"^\| `(\S+?)`", (ROOT / "README.md").read_text(), re.M)


def test_the_table_of_files_is_found():
    assert "rnn.py" in FILES and "csrc/" in FILES


@pytest.mark.parametrize("name", FILES)
def test_files_that_the_readme_names_exist(name):
    assert (ROOT / name).exists()
