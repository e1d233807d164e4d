"""The pages of docs/ say what is."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_config_keys_is_current_and_explains_every_key():
    script = runpy.run_path(str(ROOT / "scripts" / "config_page.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert page == script["page"](), "run: python scripts/config_page.py"
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    unexplained = [cells[0] for cells in rows if cells[-1].strip() == "|" and "](#" not in cells[1]]
    assert not unexplained, "a comment beside the field says what it is"
