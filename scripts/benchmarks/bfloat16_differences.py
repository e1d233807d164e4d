"""Where bfloat16 makes the log-probs of sampler and trainer differ.

    python scripts/benchmarks/bfloat16_differences.py points        # Qwen2.5-1.5B's shape, random: each rounding alone
    python scripts/benchmarks/bfloat16_differences.py model FOLDER  # a real model: two programs, the same tokens

`points` computes one forward pass in float32 and rounds to bfloat16 only where it is told to. Two programs that round
there, each in its own way, differ by √2 times the error of one, which is what is printed.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.config import PromptSection
from psyche_jax.data.chat import prompt_tokens
from psyche_jax.data.records import Message
from psyche_jax.data.streams import pad_prompts
from psyche_jax.model.decode import generate
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.log_probs import response_hidden, token_scores
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.train.stored_models import open_model

# Qwen2.5-1.5B with a small vocabulary.
LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 28, 1536, 8960, 12, 2, 128, 16384
ROWS, LENGTH = 2, 96
POINTS = {
    "n1": "normalized input of attention",
    "qkv": "queries, keys, values",
    "rope": "queries and keys after RoPE",
    "P": "attention weights",
    "ao": "result of attention",
    "oo": "output of o_proj",
    "res": "the sum that layers add to",
    "n2": "normalized input of the MLP",
    "gu": "outputs of gate_proj and up_proj",
    "inner": "their product",
    "do": "output of down_proj",
    "nf": "hidden states that the head reads",
}
INPUTS_OF_PRODUCTS = ("n1", "qkv", "rope", "P", "ao", "n2", "inner", "nf")


def forward(weights: dict[str, jax.Array], embedding: jax.Array, tokens: jax.Array, on: dict[str, Any]) -> jax.Array:
    """Log-probs [rows, length, vocabulary] of Qwen2's forward pass in float32, rounded to bfloat16 where `on` says."""

    def rounded(point: str, x: jax.Array) -> jax.Array:
        return jnp.where(on[point], jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7), x)

    def norm(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    angles = jnp.arange(LENGTH)[:, None] * 1e6 ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cosine, sine = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))

    def rotate(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)

    def layer(x: jax.Array, stored: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        weight = {name: value.astype(jnp.float32).T for name, value in stored.items()}
        normal = rounded("n1", norm(x))
        query, key, value = (rounded("qkv", normal @ weight[n]).reshape(ROWS, LENGTH, -1, HEAD_DIM) for n in "qkv")
        query, key = rounded("rope", rotate(query)), rounded("rope", rotate(key))
        key, value = (jnp.repeat(array, HEADS // KV_HEADS, axis=2) for array in (key, value))
        scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(HEAD_DIM), -1e30)
        attended = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", rounded("P", attended), value)
        mixed = rounded("ao", mixed / attended.sum(axis=-1).swapaxes(1, 2)[..., None]).reshape(ROWS, LENGTH, -1)
        x = rounded("res", x + rounded("oo", mixed @ weight["o"]))
        normal = rounded("n2", norm(x))
        gate, up = rounded("gu", normal @ weight["gate"]), rounded("gu", normal @ weight["up"])
        return rounded("res", x + rounded("do", rounded("inner", jax.nn.silu(gate) * up) @ weight["down"])), None

    x, _ = jax.lax.scan(layer, embedding[tokens], weights)
    return jax.nn.log_softmax(rounded("nf", norm(x)) @ embedding.T)


def points() -> None:
    """Print what each place of rounding does to the log-probs of drawn tokens."""
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"q": (wide, WIDTH), "k": (narrow, WIDTH), "v": (narrow, WIDTH), "o": (WIDTH, wide)}
    shapes |= {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    keys = iter(jax.random.split(jax.random.key(0), len(shapes) + 3))
    weights = {
        name: (0.02 * jax.random.normal(next(keys), (LAYERS, *shape))).astype(jnp.bfloat16)
        for name, shape in shapes.items()
    }
    embedding = 0.02 * jax.random.normal(next(keys), (VOCABULARY, WIDTH))
    tokens = jax.random.randint(next(keys), (ROWS, LENGTH), 0, VOCABULARY)
    program = jax.jit(forward)

    def log_probs(*on: str) -> jax.Array:
        return program(weights, embedding, tokens, {point: np.bool_(point in on) for point in POINTS})

    exact = log_probs()
    drawn = jax.random.categorical(next(keys), exact)[..., None]

    def difference(*on: str) -> float:
        error = jnp.take_along_axis(log_probs(*on) - exact, drawn, axis=-1)
        return float(np.sqrt(2) * jnp.abs(error).mean())

    print("mean |Δ log-prob| of two programs that round to bfloat16 there (alone; everywhere but there):")
    print(f"{'everywhere':34} {difference(*POINTS):.4f}")
    for point, name in POINTS.items():
        others = [other for other in POINTS if other != point]
        print(f"{name:34} {difference(point):.4f}  {difference(*others):.4f}", flush=True)
    print(f"{'all that products read':34} {difference(*INPUTS_OF_PRODUCTS):.4f}")


def model(folder: str) -> None:
    """Print the difference of sampler and trainer on responses of a real model, sampled at temperature 1."""
    stored = open_model(folder)
    tokenizer = load_tokenizer(stored.tokenizer_folder)
    execution = Execution(Sharding(make_mesh(), TRAIN_RULES), jnp.dtype("bfloat16"), "full")
    parameters = stored.read_parameters(execution.sharding, jnp.dtype("float32"))
    asked = ("Why do people feel lonely?", "What is 12*13? Think step by step.", "List causes of anxiety.", "Hello!")
    prompt = PromptSection(system="", instruction="")
    batch = pad_prompts([prompt_tokens(tokenizer, [Message("user", text)], prompt) for text in asked], 512)
    prompts = batch["tokens"], batch["mask"]
    sampling = Sampling(96, 1.0, 8)
    config = stored.config
    rollout = jax.jit(partial(generate, config, sampling=sampling, execution=execution))(
        parameters, *prompts, jax.random.key(2)
    )

    @jax.jit
    def trained(parameters: Any) -> jax.Array:
        policy = bind(config, parameters)
        hidden = response_hidden(policy, *prompts, rollout.tokens, rollout.mask, execution, share_prompt=True)
        return token_scores(policy, hidden, rollout.tokens, execution).log_probs

    error = np.abs(trained(parameters) - rollout.log_probs)[np.asarray(rollout.mask)]
    print(f"{len(error)} tokens: |Δ log-prob| mean {error.mean():.4f}, max {error.max():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("points")
    verbs.add_parser("model").add_argument("folder")
    arguments = parser.parse_args()
    points() if arguments.verb == "points" else model(arguments.folder)
