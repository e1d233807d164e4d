"""The programs in scripts/, as modules for the tests of what they are made of."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(folder: str, name: str) -> ModuleType:
    """scripts/FOLDER/NAME.py, imported but not run."""
    with mock.patch.object(sys, "path", [str(SCRIPTS / folder), *sys.path]):
        return importlib.import_module(name)
