"""How the command's process begins."""

import os
import platform
import subprocess
import sys

import pytest

from psyche_jax.cli.start import set_malloc
from psyche_jax.model.sharding import set_tpu_flags

# A process that was started as this one, and says with which arguments it runs and how many page faults a step takes.
STEPS = """
import resource, sys
from psyche_jax.cli import start
start.set_malloc()
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # its product of 64 MiB is a temporary
    return jnp.sin(x @ x.T) @ x

x = jnp.ones((4096, 8))
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4, sys.argv[1:])
"""


def run(tmp_path, **environment):
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, str(script), "a", "--b c"],
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    faults, _, arguments = done.stdout.partition(" ")
    assert arguments.strip() == "['a', '--b c']"
    return float(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory allocator is not glibc's")
def test_a_step_on_the_cpu_keeps_its_memory(tmp_path):
    """A setting that the environment has stays: with it every step takes 64 MiB anew, in pages of 4 KiB."""
    assert run(tmp_path) < 2000 < run(tmp_path, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")


@pytest.mark.parametrize("libc", [("glibc", "2.31"), ("glibc", ""), ("", "")])
def test_an_allocator_without_these_settings_is_left_alone(libc, monkeypatch):
    """An older glibc knows some of them only, which would slow it down."""
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("it began anew"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    set_malloc()


def test_a_failed_command_does_not_wait_for_the_threads_of_libraries():
    """With the exit code of the command; such a thread would keep Python from ending."""
    script = (
        "import sys, threading, time\n"
        "from psyche_jax.cli import __main__ as command\n"
        "command._LINGER_SECONDS = 0.1\n"
        "command.main = lambda: threading.Thread(target=time.sleep, args=[600]).start() or 1\n"
        "sys.exit(command.run())\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 1


@pytest.mark.parametrize("given", [None, "", "--xla_a=1"])
def test_the_tpu_compiler_gets_our_flags_or_those_that_are_set(given, monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    if given is not None:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    set_tpu_flags()
    flags = os.environ["LIBTPU_INIT_ARGS"]
    assert flags == given if given is not None else "--xla_enable_async_all_gather=true" in flags


# Interrupted where Python drops exceptions, as JAX's callback of the garbage collector is.
INTERRUPTED = """
import gc, signal, time
from psyche_jax.cli import __main__ as command

def tidy(phase, info):
    gc.callbacks.remove(tidy)
    signal.raise_signal(signal.SIGINT)

def main():
    gc.callbacks.append(tidy)
    gc.collect()
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process of a shell has none
command.main = main
try:
    command.run()
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_is_heard_wherever_it_comes():
    result = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=50)
    assert (result.returncode, result.stdout, result.stderr) == (0, "heard\n", "")
