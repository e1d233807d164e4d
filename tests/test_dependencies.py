"""What is imported is declared, and what reaches into other packages' private parts finds them as it expects."""

import ast
import inspect
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = {"torch", "wandb", "redis"}  # torch is only compared with; the others are extras


def imported(folder: Path) -> dict[str, Path]:
    """Top-level packages that are imported anywhere in `folder`, each with a file that does."""
    found: dict[str, Path] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {name.partition(".")[0]: path for name in names}
    return found


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w.-]+", line) for line in project["dependencies"]]
    return {normal(name[0]) for name in names if name}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared():
    distributions = packages_distributions()
    for name, path in imported(ROOT / "psyche_jax").items():
        if name in sys.stdlib_module_names or name in OPTIONAL | {"psyche_jax"}:
            continue
        carried_by = {normal(package) for package in distributions.get(name, [name])}
        assert carried_by & declared(), f"{path.relative_to(ROOT)} imports {name}: declare {carried_by or name}"


def test_private_parts_of_gcsfs():
    """`bucket_files.py` asks once where gcsfs asks six times: there is no public way to set that."""
    gcsfs = pytest.importorskip("gcsfs")
    request = gcsfs.GCSFileSystem._request
    assert hasattr(request, "__wrapped__"), "gcsfs no longer wraps _request in its own tries: see bucket_files.py"
    once = inspect.unwrap(request)
    assert inspect.iscoroutinefunction(once) and list(inspect.signature(once).parameters)[:3] == [
        "self",
        "method",
        "path",
    ]
    assert all(hasattr(gcsfs.GCSFileSystem, name) for name in ("_rm", "_open")), "gcsfs's files: see bucket_files.py"


def test_private_parts_of_orbax():
    """`streaming.py` writes arrays where Orbax says, by descriptions that only Orbax makes."""
    from orbax.checkpoint import type_handlers

    parameters = inspect.signature(type_handlers.get_json_tspec_write).parameters
    assert {"use_ocdbt", "global_shape", "local_shape", "dtype", "process_index"} <= set(parameters)
    assert "use_ocdbt" in inspect.signature(type_handlers.get_json_tspec_read).parameters
