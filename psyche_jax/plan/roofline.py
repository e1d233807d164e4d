"""FLOPs and bytes of each phase, counted by arithmetic with loops multiplied out, and the time they take at least."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.model.adapters import num_trained
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.flops import causal_flops, head_flops, layer_weights, layers_flops
from psyche_jax.model.kernels import RING_BLOCKS
from psyche_jax.plan.compile import MicroBatch, PlanConfig, batch_places, decoding_mesh, micro_batch
from psyche_jax.plan.rollout import Decoding, simulate
from psyche_jax.plan.slices import SOURCE, Slice

_FLOAT32_BYTES = 4  # of each number that is trained
ASSUMPTIONS = (
    f"published peaks ({SOURCE}); compute, memory and interconnect overlap wholly, and no latency counts",
    "causal attention computes half of all pairs, decoding reads of the cache what each response has filled",
    "weights are gathered once per micro-batch and direction; all links of a chip carry them",
)


@dataclass(frozen=True)
class Phase:
    """Part of a program. `flops` of all devices together; bytes of one: from and to its memory, and received."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    ici_bytes: float = 0.0

    def __add__(self, other: "Phase") -> "Phase":
        return Phase(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes, self.ici_bytes + other.ici_bytes)

    def __rmul__(self, times: float) -> "Phase":
        return Phase(times * self.flops, times * self.hbm_bytes, times * self.ici_bytes)

    def seconds(self, slice_: Slice) -> float:
        """The longest of computing, memory and interconnect."""
        return max(self._times(slice_).values())

    def bound(self, slice_: Slice) -> str:
        """Which of the three it is."""
        times = self._times(slice_)
        return max(times, key=lambda name: times[name])

    def _times(self, slice_: Slice) -> dict[str, float]:
        chip = slice_.chip
        return {
            "compute": self.flops / slice_.device_count / chip.bf16_flops,
            "memory": self.hbm_bytes / chip.hbm_bytes_per_second,
            "interconnect": self.ici_bytes / chip.ici_bytes_per_second,
        }


def count_phases(
    config: PlanConfig, model: ModelConfig, mesh: Mapping[str, int], decoding: Decoding | None = None
) -> dict[str, Phase]:
    """The phases of one run of the program (one step of SFT, one iteration of GRPO).

    `decoding`: the steps that decoding takes; None: those of responses that are all of full length.
    """
    return _Counter(config, model, mesh).phases(decoding)


def count_attention(
    config: PlanConfig, model: ModelConfig, mesh: Mapping[str, int], decoding: Decoding | None = None
) -> dict[str, Phase]:
    """What of that is attention, by the phases of a forecast."""
    return _Counter(config, model, mesh).attention(decoding)


def decoding_of(config: GrpoConfig, mesh: Mapping[str, int], lengths: Sequence[int] | None = None) -> Decoding:
    """The steps of decoding; without `lengths` of the responses all are as long as can be."""
    responses = config.prompts_per_step * config.generations_per_prompt
    lengths = [config.max_new_tokens] * responses if lengths is None else lengths
    mesh = decoding_mesh(config, mesh)
    return _simulate(tuple(lengths), config.slots, batch_places(mesh), config.max_new_tokens)


_simulate = functools.cache(simulate)  # many variants of a search decode in the same way


@dataclass(frozen=True)
class _Counter:
    config: PlanConfig
    model: ModelConfig
    mesh: Mapping[str, int]

    def phases(self, decoding: Decoding | None) -> dict[str, Phase]:
        config = self.config
        part = micro_batch(config, self.mesh)
        if isinstance(config, SftConfig):
            parts = config.batch_size // part.rows
            forward, backward = self._forward(part, part.length), self._backward(part, part.length)
            return {"forward": parts * forward, "backward": parts * backward, "optimizer": self._optimizer()}
        responses = config.prompts_per_step * config.generations_per_prompt
        parts = responses // part.rows
        updates, passes = config.updates_per_step, config.passes_per_step
        scoring = self._forward(part, config.max_new_tokens)
        while_decoding = replace(self, mesh=decoding_mesh(config, self.mesh))
        phases = {
            "gather_for_decoding": self._decoding_layout(config),
            "prefill": while_decoding.prefill(config),
            "decode": while_decoding.decode(config, decoding or decoding_of(config, self.mesh)),
        }
        if config.objective.kl_coefficient:
            phases["reference"] = parts * scoring
        if config.old_log_probs_share:
            phases["old_log_probs"] = config.old_log_probs_share * parts * scoring
        if config.objective.top_entropy < 1:
            phases["entropies"] = passes * parts * scoring
        return {
            **phases,
            "forward": passes * parts * scoring,
            "backward": passes * parts * self._backward(part, config.max_new_tokens),
            "optimizer": updates * self._optimizer(),
        }

    @property
    def _compute(self) -> int:
        return jnp.dtype(self.config.model.compute_dtype).itemsize

    @property
    def _stored(self) -> int:
        return jnp.dtype(self.config.model.dtype).itemsize

    @property
    def _as_read(self) -> int:  # a weight of a linear map, as products read it
        return self._stored if self.model.int8 else self._compute

    @property
    def _places(self) -> int:
        return batch_places(self.mesh)

    def _forward(self, part: MicroBatch, positions: int) -> Phase:
        """One micro-batch: layers, and the loss on the last `positions` of each row."""
        model, fsdp, tensor = self.model, self.mesh["fsdp"], self.mesh["tensor"]
        flops = causal_flops(model, part.prompts, part.prompt_length)
        flops += causal_flops(model, part.rows, part.length, before=part.prompt_length)
        flops += head_flops(model, part.rows * positions)
        weights = model.num_hidden_layers * layer_weights(model) / tensor
        own = model.num_parameters / fsdp / tensor
        hbm = own * self._stored + 2 * weights * self._as_read
        hbm += part.tokens / self._places * self._traffic_per_token()
        ici = weights * self._as_read * (fsdp - 1) / fsdp + self._reduced_activations(part.tokens)
        return Phase(flops, hbm, ici)

    def _backward(self, part: MicroBatch, positions: int) -> Phase:
        """As `_forward`: twice its products, what remat computes again, and the gradients' way to their places."""
        model, mesh = self.model, self.mesh
        forward = self._forward(part, positions)
        head = head_flops(model, part.rows * positions)
        layers = forward.flops - head
        attention = layers - layers_flops(model, part.tokens, 1, 0)
        again = {"full": layers, "dots": attention, "none": 0.0}[self.config.model.remat]
        turns = 3 if self.config.model.remat == "full" else 2
        trained = num_trained(model)
        gradients = trained / mesh["tensor"] * self._compute * (mesh["fsdp"] - 1) / mesh["fsdp"]
        gradients += _all_reduced(trained * _FLOAT32_BYTES / mesh["fsdp"] / mesh["tensor"], mesh["data"])
        accumulated = 2 * trained * _FLOAT32_BYTES / mesh["fsdp"] / mesh["tensor"]
        # The base of adapters is frozen: there are no products for the gradient by its weights.
        frozen = 0.0 if model.adapter is None else layers - attention + head
        return Phase(
            2 * forward.flops - frozen + again + head,
            turns * forward.hbm_bytes + accumulated,
            forward.ici_bytes + gradients + (turns - 2) * self._reduced_activations(part.tokens),
        )

    def _optimizer(self) -> Phase:
        trained = num_trained(self.model)
        # Reads weights, two moments and the gradient (twice: also for its norm), writes the first three.
        section = self.config.optimizer
        moments = sum(jnp.dtype(dtype).itemsize for dtype in (section.mu_dtype, section.nu_dtype))
        each = 4 * _FLOAT32_BYTES + 2 * moments
        return Phase(15.0 * trained, trained * each / self.mesh["fsdp"] / self.mesh["tensor"], 0.0)

    def _decoding_layout(self, config: GrpoConfig) -> Phase:
        chips = self.mesh["fsdp"] * self.mesh["tensor"]
        own = self.model.num_parameters / chips
        size = self.model.num_parameters / decoding_mesh(config, self.mesh)["tensor"] * self._as_read
        return Phase(0.0, own * self._stored + size, size - own * self._as_read)

    def prefill(self, config: GrpoConfig) -> Phase:
        model, length = self.model, config.data.max_prompt_length
        prompts = config.prompts_per_step
        weights = model.num_hidden_layers * layer_weights(model) / self.mesh["tensor"] * self._as_read
        flops = causal_flops(model, prompts, length) + head_flops(model, prompts)
        tokens = prompts / self._places * length
        return Phase(flops, weights + tokens * self._traffic_per_token(), self._reduced_activations(prompts * length))

    def decode(self, config: GrpoConfig, decoding: Decoding) -> Phase:
        model, tensor = self.model, self.mesh["tensor"]
        tokens = decoding.tokens - decoding.responses  # the first ones follow from the prompts
        pairs = config.data.max_prompt_length + decoding.attended / max(tokens, 1)
        flops = layers_flops(model, tokens, 1, pairs) + head_flops(model, tokens)
        # Every step reads all weights, and makes logits of all rows.
        turns = sum(loop.turns for loop in decoding.loops)
        rows = sum(loop.turns * loop.rows for loop in decoding.loops)
        embedding = model.vocab_size * model.hidden_size * self._compute
        weights = (model.num_hidden_layers * layer_weights(model) * self._as_read + embedding) / tensor
        logits = model.vocab_size / tensor * 4 * 3
        hbm = turns * weights + self.cache_bytes(config, decoding) + rows * logits
        return Phase(flops, hbm, self._reduced_activations(rows * self._places))

    def cache_bytes(self, config: GrpoConfig, decoding: Decoding) -> float:
        """What decoding reads of the cache: in every step all prompts, or one for each row, and what rows have said."""
        model = self.model
        numbers = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim / self.mesh["tensor"]
        prompts = config.prompts_per_step / self._places
        of_prompts = sum(loop.turns * min(prompts, loop.rows) for loop in decoding.loops)
        places = of_prompts * config.data.max_prompt_length + decoding.attended / self._places
        return places * numbers * self._compute

    def kernel_bytes(self, decoding: Decoding) -> float:
        """What the kernel of decoding reads of the cache: of each row what it has said, by whole blocks."""
        model = self.model
        numbers = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim / self.mesh["tensor"]
        # A row's places begin and end within a block: at both ends together a block more is read, at most.
        places = decoding.attended + (decoding.tokens - decoding.responses) * RING_BLOCKS[0]
        return places / self._places * numbers * self._compute

    def attention(self, decoding: Decoding | None) -> dict[str, Phase]:
        """What of the phases is attention, which may be in kernels: its products, or what decoding reads."""
        config = self.config
        part = micro_batch(config, self.mesh)
        once = self._attention(part.prompts, part.prompt_length) + self._attention(
            part.rows, part.length, part.prompt_length
        )
        again = 1 if self.config.model.remat == "none" else 2
        # Backward has seven products where forward has two.
        update = (again + 3.5) * once
        if isinstance(config, SftConfig):
            return {"updates": config.batch_size // part.rows * update}
        parts = config.prompts_per_step * config.generations_per_prompt // part.rows
        scored = bool(config.objective.kl_coefficient) + config.old_log_probs_share
        scored += config.passes_per_step * (config.objective.top_entropy < 1)
        while_decoding = replace(self, mesh=decoding_mesh(config, self.mesh))
        return {
            "prefill": self._attention(config.prompts_per_step, config.data.max_prompt_length),
            "decoding": Phase(0.0, while_decoding.kernel_bytes(decoding or decoding_of(config, self.mesh))),
            "log_probs": scored * parts * once,
            "updates": config.passes_per_step * parts * update,
        }

    def _attention(self, rows: int, length: int, before: int = 0) -> Phase:
        pairs = causal_flops(self.model, rows, length, before) - layers_flops(self.model, rows, length, 0)
        return Phase(pairs, 0.0, 0.0)

    def _traffic_per_token(self) -> float:
        """Bytes: what the matrix products of all layers read and write for one token."""
        model, tensor = self.model, self.mesh["tensor"]
        heads, kv_heads = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        split = 2 * heads + 2 * kv_heads + 3 * model.intermediate_size
        return model.num_hidden_layers * (6 * model.hidden_size + split / tensor) * self._compute

    def _reduced_activations(self, tokens: int) -> float:
        """Bytes a chip receives where two products of each layer are summed over `tensor`."""
        size = tokens / self._places * self.model.hidden_size * self._compute
        return 2 * self.model.num_hidden_layers * _all_reduced(size, self.mesh["tensor"])


def _all_reduced(size: float, parts: int) -> float:
    """Bytes that a chip receives when an array of `size` is summed over `parts` chips."""
    return 2 * size * (parts - 1) / parts
