"""What int8 weights of the linear maps do to a real model's predictions, beside what bfloat16 does.

    python scripts/benchmarks/int8_quality.py MODEL TEXT [TEXT ...] [--length 256] [--rows 32]

Activations are float32, so that weights alone differ. Each text is cut into rows of equal length; perplexity is of all
tokens but the first of a row. Differences are from the weights as they are stored.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.config import StoredDtype
from psyche_jax.model.adapters import as_trained
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.linear import Parameters
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.train.stored_models import open_model


def measured(exact: np.ndarray, found: np.ndarray, row: list[int]) -> tuple[float, ...]:
    """Of a row's logits [length, vocabulary]: mean and largest |difference|, KL, agreement, loss."""
    reference, log_probs = (np.asarray(jax.nn.log_softmax(logits)) for logits in (exact, found))
    error = np.abs(found - exact)
    divergence = (np.exp(reference) * (reference - log_probs)).sum(-1).mean()
    loss = -np.take_along_axis(log_probs[:-1], np.asarray(row)[1:, None], axis=-1).mean()
    return error.mean(), error.max(), divergence, (found.argmax(-1) == exact.argmax(-1)).mean(), loss


def main() -> None:
    """Print one line for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder or a checkpoint")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 files")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default 256)")
    parser.add_argument("--rows", type=int, default=32, help="how many rows at most (default 32)")
    arguments = parser.parse_args()

    stored = open_model(arguments.model)
    tokenizer = load_tokenizer(stored.tokenizer_folder)
    rows: list[list[int]] = []
    for path in arguments.texts:
        tokens = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        rows += [tokens[start : start + arguments.length] for start in range(0, len(tokens), arguments.length)]
    rows = [row for row in rows if len(row) == arguments.length]
    kept = rows[:: -(-len(rows) // arguments.rows)]  # spread over all texts
    execution = Execution(Sharding(make_mesh(), TRAIN_RULES), jnp.dtype("float32"))

    @partial(jax.jit, static_argnums=0)
    def row_logits(config: ModelConfig, parameters: Parameters, row: jax.Array) -> jax.Array:
        model, ones = bind(config, parameters), jnp.ones_like(row)
        return model.logits(model(row, ones, jnp.cumsum(ones, axis=1) - 1, execution)[0])

    def logits_of(dtype: StoredDtype) -> Callable[[list[int]], np.ndarray]:
        config = as_trained(stored.config, dtype, None)
        parameters = stored.read_merged(execution.sharding, jnp.dtype(dtype))
        return lambda row: np.asarray(row_logits(config, parameters, np.asarray([row], np.int32)))

    exact = logits_of("float32")
    print(f"{len(kept)} rows of {arguments.length} tokens")
    dtypes: tuple[StoredDtype, ...] = ("float32", "bfloat16", "int8")
    for dtype in dtypes:
        found = logits_of(dtype)
        figures = np.asarray([measured(exact(row), found(row), row) for row in kept])
        mean, _, divergence, same, loss = figures.mean(axis=0)
        print(
            f"{dtype:8}  |Δ logit| mean {mean:.4f}, max {figures[:, 1].max():.3f}  KL {divergence:.2e}  "
            f"likeliest token the same {same:.4f}  perplexity {np.exp(loss):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
