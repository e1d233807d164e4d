"""What is imported is declared, and what is used of other packages that they do not promise stands in one place."""

import ast
import inspect
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import gcsfs
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import psyche_jax

PACKAGE = Path(psyche_jax.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = {
    "torch": "torch",
    "wandb": "wandb",
    "redis": "redis",
    "openpyxl": "openpyxl",
}  # module: distribution; need not be installed
OF_GOOGLE = {"google.cloud": "google-cloud-storage", "google.auth": "google-auth", "google.api_core": "google-api-core"}
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields"}
PRIVATE_IN = {"buckets.py"}  # each with a test below that says what it relies on


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node


@cache
def imported() -> dict[str, str]:
    """Third-party modules and a file that imports each; of `google` the package within."""
    found: dict[str, str] = {}
    for path, node in nodes():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] not in sys.stdlib_module_names | {"psyche_jax"}:
                found[".".join(parts[:3]) if parts[0] == "google" else parts[0]] = path.name
    return found


def distributions(module: str) -> set[str]:
    """What may have brought a module: several do share `google`."""
    of_google = {
        "google.cloud": "google-cloud-storage",
        "google.auth": "google-auth",
        "google.api_core": "google-api-core",
    }
    for prefix, name in of_google.items():
        if module.startswith(prefix):
            return {name}
    names = [OPTIONAL[module]] if module in OPTIONAL else packages().get(module, [])
    return {canonicalize_name(name) for name in names}


packages = cache(packages_distributions)


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_every_import_is_declared():
    declared = names(PROJECT["dependencies"])
    extras = names([line for extra in ("torch", "wandb", "redis", "xlsx") for line in EXTRAS[extra]])
    undeclared = {
        f"{file} imports {module}, of {distributions(module) or 'nothing installed'}"
        for module, file in imported().items()
        if not distributions(module) & (extras if module in OPTIONAL else declared)
    }
    assert not undeclared, "add to dependencies in pyproject.toml"


def test_every_dependency_is_imported():
    """`jax[tpu]` and the like aside: what is only needed by tests or scripts stands in the extra `test`."""
    used = set().union(*map(distributions, imported()))
    assert not names(PROJECT["dependencies"]) - used


def test_every_dependency_has_a_lower_bound():
    """`make lowest` installs these and runs the tests that touch them."""
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in ("tpu", "torch", "wandb", "redis", "xlsx") for line in EXTRAS[extra]),
    ]
    assert [line for line in lines if not any(part.operator == ">=" for part in Requirement(line).specifier)] == []


def test_private_names_of_other_packages_stand_in_one_place():
    """No `_src`, and no attribute with an underscore but those of the file's own classes."""
    attributes = [(path, node) for path, node in nodes() if isinstance(node, ast.Attribute)]
    own = {(path, node.attr) for path, node in attributes if ast.unparse(node.value) in ("self", "cls")}
    found = {
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path, node in attributes
        if node.attr.startswith("_") and not node.attr.startswith("__")
        if node.attr not in OF_NAMED_TUPLES and ast.unparse(node) != "os._exit" and (path, node.attr) not in own
    }
    found |= {
        f"{path.name}:{node.lineno}: from {node.module}"
        for path, node in nodes()
        if isinstance(node, ast.ImportFrom) and "._" in f"{node.module}" and not f"{node.module}".endswith("__main__")
    }
    assert not {line for line in found if line.split(":")[0] not in PRIVATE_IN}


@pytest.mark.parametrize("name", ["_request", "_rm", "_open"])
def test_what_bucket_files_replaces_in_gcsfs_is_still_there(name):
    method = getattr(gcsfs.GCSFileSystem, name, None)
    assert method is not None, f"gcsfs has no GCSFileSystem.{name} any more: buckets.BucketFiles replaces it in vain"


def test_gcsfs_still_wraps_one_request():
    """`_request` is a coroutine that tries again, around one that asks once: `bucket_files` takes the inner one."""
    request = gcsfs.GCSFileSystem._request
    once = inspect.unwrap(request)
    assert inspect.iscoroutinefunction(once), "gcsfs: the inside of GCSFileSystem._request is no coroutine any more"
    assert once is not request, "gcsfs: GCSFileSystem._request does not try again by itself any more: use it as it is"
    asking = inspect.getsource(gcsfs.GCSFileSystem._call)
    assert "self._request(" in asking, "gcsfs: requests do not go through GCSFileSystem._request any more"
