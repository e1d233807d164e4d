"""The programs in scripts/ start: what they import is there. What else is run from the root."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


@pytest.mark.parametrize("script", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: path.stem)
def test_a_script_says_what_it_does(script, tmp_path):
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage: ")


def test_the_recipe_goes_on_after_a_failure(tmp_path):
    """With a stand-in for psyche that fails once, at each step; the benchmark's path is that of where it was called."""
    for folder in ("root/scripts", "bin", "here/PCEB data"):
        (tmp_path / folder).mkdir(parents=True)
    recipe = shutil.copy(SCRIPTS / "psyche_r1.sh", tmp_path / "root/scripts")
    stand_in = tmp_path / "bin/psyche"
    stand_in.write_text(
        """#!/bin/bash
log=../psyche.log
grep -qxF -- "$*" $log 2>/dev/null || { echo "$*" >>$log; exit 1; }
case $1 in import) out=$3 ;; data) out=$4 ;; decontaminate) out=$7 ;; export) out=$3 ;; *) exit 0 ;; esac
[ ! -e "$out" ] || { echo "$out: exists" >&2; exit 1; }
mkdir -p "$out" && touch "$out/manifest.json"
"""
    )
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def run(*arguments):
        return subprocess.run(
            [recipe, *arguments], cwd=tmp_path / "here", env=environment, capture_output=True, text=True
        )

    for wrong in ((), ("nowhere",)):
        done = run(*wrong)
        assert done.returncode == 2 and "PCEB" in done.stderr and len(done.stderr.splitlines()) == 1
    commands = sum(line.startswith("psyche ") for line in (SCRIPTS / "psyche_r1.sh").read_text().splitlines())
    codes = [run("PCEB data") for _ in range(commands + 2)]
    assert [done.returncode for done in codes] == [1] * commands + [0, 0], codes[-1].stderr
    assert f"data import {tmp_path}/here/PCEB data data/pceb" in (tmp_path / "psyche.log").read_text()


def test_make_clean_keeps_runs(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("runs/sft_7b", "runs/demo", ".venv", "build"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_dir()] == [
        "runs",
        "runs/sft_7b",
    ]
