"""What the compiler's cycles are worth beside published peaks, which `pytest -s` prints; and what copies look like."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from support.tiny_plans import needs_libtpu

from psyche_jax.plan.collectives import find_copies
from psyche_jax.plan.forecast import forecast
from psyche_jax.plan.hlo import Module
from psyche_jax.plan.slices import parse_topology

pytestmark = [needs_libtpu, pytest.mark.usefixtures("optimized")]
SIZE = 8192


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1", "v4:2x2x1", "tpu7x:2x2x1"])
def test_cycles_beside_published_peaks(topology, capsys):
    slice_ = parse_topology(topology)
    place = SingleDeviceSharding(slice_.devices()[0])

    def seconds(function, *shapes):
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
        program = Module.parse(jax.jit(function).lower(*arrays).compile().as_text())
        return forecast(program, slice_, {}, {}, ()).totals[1]

    square, chip = (SIZE, SIZE), slice_.chip
    flops = 2 * SIZE**3 / seconds(lambda a, b: a @ b, square, square)
    through = 4 * SIZE**2 / seconds(lambda a: jnp.tanh(a) + 1, square)
    thin = 2 * SIZE**2 / seconds(lambda a, b: a @ b, (64, SIZE), square)
    with capsys.disabled():
        print(f"\n{chip.name}: a large product {flops / 1e12:.0f} of {chip.bf16_flops / 1e12:.0f} TFLOP/s")
        print(f"elementwise work {through / 1e9:.0f} of {chip.hbm_bytes_per_second / 1e9:.0f} GB/s")
        print(f"the weights of a thin product {thin / 1e9:.0f} of {chip.hbm_bytes_per_second / 1e9:.0f} GB/s")
    # The clock is right: no product is faster than the peak, and a large one is not far from it.
    assert 0.65 < flops / chip.bf16_flops <= 1
    assert 0.3 < through / chip.hbm_bytes_per_second <= 1
    # On v4 the weights are read ahead into a memory of the chip, which takes no time by cycles.
    assert 0.5 < thin / chip.hbm_bytes_per_second <= (3 if chip.name == "v4" else 1)


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_a_cache_that_is_turned_in_every_step_is_found(topology):
    place = SingleDeviceSharding(parse_topology(topology).devices()[0])
    cache = jax.ShapeDtypeStruct((1024, 8, 128, 128), jnp.bfloat16, sharding=place)

    def copies(step):
        @jax.jit
        def program(cache):
            with jax.named_scope("decoding_loop"):
                return jax.lax.fori_loop(0, 9, lambda _, cache: step(cache), cache)

        text = program.lower(cache).compile().as_text()
        return len(find_copies(Module.parse(text), frozenset({1024 * 8 * 128 * 128})))

    assert copies(lambda cache: cache.swapaxes(2, 3)) >= 1
    assert copies(lambda cache: cache.at[:, :, 5].set(1)) == 0, "written in place"
    assert copies(lambda cache: cache * 2) == 0, "computed"
