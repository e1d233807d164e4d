"""SFT: loss and gradient against transformers, micro-batches, what is learned, and meshes against one device."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax import traverse_util
from support.optional_torch import torch
from support.training_fixtures import PROMPT, execution, largest_difference

from psyche_jax.config import OptimizerSection
from psyche_jax.data.chat import tokenize_example
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import SftExample
from psyche_jax.data.streams import pad_examples
from psyche_jax.model.huggingface import load_tokenizer, read_parameters, tensor_names
from psyche_jax.model.qwen2 import build
from psyche_jax.train.sft import make_sft_step, next_token_loss
from psyche_jax.train.state import TrainState, initial_state, make_optimizer, make_schedule, state_shardings

# The gradient of a key's bias is 0 but for rounding, which Adam with a small epsilon would blow up to whole steps.
SECTION = OptimizerSection(learning_rate=1e-3, epsilon=1e-3, warmup=0, weight_decay=0.01)
STEPS = 4


@pytest.fixture(scope="module")
def tokenizer(tiny_root):
    return load_tokenizer(tiny_root / "model")


@pytest.fixture(scope="module")
def examples(tiny_root, tokenizer):
    records = load_records(SftExample, tiny_root / "sft.jsonl").good
    return [tokenize_example(tokenizer, record.messages, PROMPT) for record in records]


@pytest.fixture(scope="module")
def batch(examples):
    return pad_examples(examples[:8], 96)


def start(root, config, execution, optimizer):
    """The state of step 0."""
    shardings = state_shardings(optimizer, build(config)[1], execution.sharding)
    parameters = read_parameters(root / "model", config, execution.sharding, jnp.dtype("float32"))
    return initial_state(optimizer, parameters, shardings)


def train(root, config, execution, batches, micro_batches=1):
    """Losses, gradient norms and the last parameters of some steps."""
    schedule = make_schedule(SECTION, len(batches))
    optimizer = make_optimizer(SECTION, schedule)
    shardings = state_shardings(optimizer, build(config)[1], execution.sharding)
    step = make_sft_step(config, execution, optimizer, schedule, shardings, micro_batches)
    state = start(root, config, execution, optimizer)
    place = execution.sharding.named("batch", "sequence")
    history = []
    for batch in batches:
        state, metrics = step(state, jax.device_put(batch, place))
        history.append({name: float(value) for name, value in metrics.items()})
    return history, jax.device_get(state.parameters)


@pytest.fixture(scope="module")
def one_device(tiny_root, tiny_config, examples):
    """What every mesh and every split must give."""
    return train(tiny_root, tiny_config, execution(1), several(examples))


def several(examples):
    return [pad_examples(examples[i : i + 8], 96) for i in (0, 4, 8, 12)]


def spoken(tokens, tokenizer):
    """Where the assistant's content and its end are: from after `assistant\\n` to the next `<|im_end|>`."""
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = np.zeros(len(tokens), bool)
    inside = False
    for place, token in enumerate(tokens):
        found[place] = inside
        inside = (inside and token != end) or list(tokens[place + 1 - len(opening) : place + 1]) == opening
    return found


def reference_loss_and_gradients(folder: Path, batch, tokenizer):
    """transformers' own loss, with whole logits, on labels that are found anew in the text."""
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    present = torch.tensor(batch["segments"], dtype=torch.long)
    learned = np.stack([spoken(row, tokenizer) for row in batch["tokens"]]) & (batch["segments"] > 0)
    labels = tokens.masked_fill(~torch.tensor(learned), -100)
    loss = model(input_ids=tokens, attention_mask=present, labels=labels).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}, learned


def test_loss_and_gradient_are_those_of_transformers(tiny_root, tiny_config, batch, tokenizer, figure):
    expected, theirs, learned = reference_loss_and_gradients(tiny_root / "model", batch, tokenizer)
    assert (batch["loss_mask"] == learned).all()
    here = execution(1, remat="full")
    parameters = read_parameters(tiny_root / "model", tiny_config, here.sharding, jnp.dtype("float32"))
    weights = np.float32(learned) / learned.sum()
    loss = functools.partial(next_token_loss, tiny_config, here)
    (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, {**batch, "weights": weights})
    figure("SFT loss against transformers", abs(float(value) - expected), 1e-5)
    for path, gradient in traverse_util.flatten_dict(gradients, sep="/").items():
        names = tensor_names(path, tiny_config.num_hidden_layers)
        reference = np.stack([theirs[n] for n in names]) if path.startswith("layers/") else theirs[names[0]]
        figure("SFT gradient against transformers", np.abs(gradient - reference).max(), 2e-5)


def test_metrics_are_those_of_the_whole_batch(one_device, tiny_root, examples, tokenizer, figure):
    """The step's loss is the mean over all learned tokens, not a mean of rows; its norm is before clipping."""
    first = several(examples)[0]
    expected, gradients, _ = reference_loss_and_gradients(tiny_root / "model", first, tokenizer)
    norm = np.sqrt(sum(np.square(gradient.astype(np.float64)).sum() for gradient in gradients.values()))
    metrics = one_device[0][0]
    figure("SFT loss of a step against transformers", abs(metrics["loss"] - expected), 1e-5)
    figure("SFT gradient norm against transformers", abs(metrics["grad_norm"] / norm - 1), 1e-5)
    assert norm > SECTION.max_grad_norm, "the model should be such that clipping matters"
    assert metrics["num_tokens"] == sum(len(example.tokens) for example in examples[:8])
    rates = [line["learning_rate"] for line in one_device[0]]
    np.testing.assert_allclose(rates, [make_schedule(SECTION, STEPS)(i) for i in range(STEPS)], rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_change_nothing(micro_batches, one_device, tiny_root, tiny_config, examples, figure):
    """Rows have different numbers of learned tokens, so a mean of means would differ."""
    counts = [example.loss_mask.sum() for example in examples[:8]]
    assert len(set(counts)) > 3
    history, parameters = train(tiny_root, tiny_config, execution(1), several(examples), micro_batches)
    for name in ("loss", "grad_norm"):
        values, expected = ([line[name] for line in lines] for lines in (history, one_device[0]))
        figure(f"SFT {name}, micro-batches", np.abs(np.divide(values, expected) - 1).max(), 1e-5)
    figure("SFT first loss, micro-batches", abs(history[0]["loss"] - one_device[0][0]["loss"]), 1e-5)
    figure("SFT parameters, micro-batches", largest_difference(parameters, one_device[1]), 1e-4)


def test_the_rate_that_is_logged_is_the_one_that_is_used(tiny_config, tiny_root, batch):
    """Skipped steps leave the optimizer's count, so a warm-up does not go on meanwhile, and is not said to."""
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    optimizer = make_optimizer(SECTION, schedule)
    places = state_shardings(optimizer, build(tiny_config)[1], execution(1).sharding)
    step = make_sft_step(tiny_config, execution(1), optimizer, schedule, places, 1)
    state = start(tiny_root, tiny_config, execution(1), optimizer)
    state = TrainState(state.step, jax.tree.map(lambda leaf: leaf * np.nan, state.parameters), state.optimizer_state)
    for _ in range(2):
        state, metrics = step(state, batch)
        assert (metrics["skipped_updates"], metrics["learning_rate"]) == (1, 0)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)], ids=["fsdp 8", "data 2, fsdp 2, tensor 2"])
def test_eight_devices_equal_one(mesh, one_device, tiny_root, tiny_config, examples, figure):
    history, parameters = train(tiny_root, tiny_config, execution(8, *mesh), several(examples))
    for ours, expected in zip(history, one_device[0], strict=True):
        figure("SFT loss, 8 devices", abs(ours["loss"] - expected["loss"]), 1e-5)
    figure("SFT parameters, 8 devices", largest_difference(parameters, one_device[1]), 1e-4)
    assert history[-1]["loss"] < history[0]["loss"]


def test_only_what_the_assistant_says_is_learned(tiny_root, tiny_config, batch):
    """The gradient by the weights of the loss: a token outside the mask has none, whatever it is."""
    here = execution(1)
    parameters = read_parameters(tiny_root / "model", tiny_config, here.sharding, jnp.dtype("float32"))
    loss = jax.jit(functools.partial(next_token_loss, tiny_config, here))
    weights = np.float32(batch["loss_mask"])
    value = float(loss(parameters, {**batch, "weights": weights})[0])
    # What stands after the last learned token of a row is seen by nothing that is learned.
    changed = batch["tokens"].copy()
    for row, mask in zip(changed, batch["loss_mask"], strict=True):
        row[np.flatnonzero(mask)[-1] + 1 :] = 5
    assert float(loss(parameters, {**batch, "tokens": changed, "weights": weights})[0]) == pytest.approx(value, 1e-6)


def test_state_lies_where_the_mesh_says(tiny_root, tiny_config):
    """Parameters and moments are split over fsdp; nothing but vectors and counters is whole on every device."""
    optimizer = make_optimizer(SECTION, make_schedule(SECTION, 4))
    state: TrainState = start(tiny_root, tiny_config, execution(8), optimizer)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.parameters, state.optimizer_state)):
        shards = {shard.data.shape for shard in leaf.addressable_shards}
        split = any(np.prod(shape) < leaf.size for shape in shards)
        assert split == (path[-1].key not in ("bias", "scale") if leaf.ndim > 1 else False), path
