"""What a command does before its first computation."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_STEP = """
from psyche_jax.cli.start import start_jax
start_jax()
import resource
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
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory allocator is not glibc's")
def test_a_step_on_the_cpu_does_not_take_its_memory_anew(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_A_STEP], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1000, "64 MiB would be 16384 pages"
