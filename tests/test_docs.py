"""The pages of docs/ say what is."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

from psyche_jax import cli

ROOT = Path(__file__).parents[1]


def test_the_page_of_config_keys_is_current_and_explains_every_key():
    script = runpy.run_path(str(ROOT / "scripts" / "config_page.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert page == script["page"](), "run: python scripts/config_page.py"
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    unexplained = [cells[0] for cells in rows if cells[-1].strip() == "|" and "](#" not in cells[1]]
    assert not unexplained, "a comment beside the field says what it is"


@pytest.mark.parametrize("page", ["tutorial.md", "tutorial.zh.md"])
def test_the_tutorial_imports_its_sample_as_it_says(page, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    command, said = re.search(
        r"^\$ psyche (data import exam\.csv .*?)\n(.*?)```", text, re.MULTILINE | re.DOTALL
    ).groups()
    shutil.copy(ROOT / "docs" / "exam.csv", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 0
    printed = "".join(capsys.readouterr()).splitlines()
    assert sorted(printed) == sorted(said.splitlines())
