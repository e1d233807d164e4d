"""Supervised fine-tuning on chat records: what it trains on, the loss on what the assistant says, the loop."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from psyche_jax.config import PromptSection, SftConfig
from psyche_jax.config_files import config_to_dict
from psyche_jax.data.chat import TokenizedExample, end_of_turn_id, opened_text, tokenize_example
from psyche_jax.data.dataset import Dataset, is_dataset, load_records, open_dataset
from psyche_jax.data.packing import PACKED, check_packing, unpacked_rows
from psyche_jax.data.records import SftExample
from psyche_jax.data.streams import Batch, Part, ReadsSeveral, batches, pad_examples
from psyche_jax.errors import UserError
from psyche_jax.model.adapters import joined
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.flops import causal_flops, head_flops, update_passes
from psyche_jax.model.linear import Parameters
from psyche_jax.model.log_probs import token_scores
from psyche_jax.model.qwen2 import Execution, bind
from psyche_jax.storage.files import as_path
from psyche_jax.train import hosts
from psyche_jax.train.checkpoints import checkpoint_metadata
from psyche_jax.train.loop import Evaluation, Training
from psyche_jax.train.preemption import listening
from psyche_jax.train.runs import open_run
from psyche_jax.train.setup import (
    about_base,
    abstract_state,
    check_rows,
    header,
    keep_tokenizer,
    prepare,
    report_skipped,
    trained_on,
)
from psyche_jax.train.state import (
    TrainState,
    accumulate_gradients,
    apply_gradients,
    initial_state,
    make_optimizer,
    make_schedule,
    schedule_warning,
    updates_counted,
)


@dataclass(frozen=True)
class Examples:
    """`items` for `streams.batches`, with what `collate` makes of them.

    `parts` are those of a mixture; `set_aside` names what is not used; `length` is that of packed rows, None if the
    items are single examples; `content` is a hash of what is used, in its order, wherever it lies. `count` and `tokens`
    are of the examples, packed or not.
    """

    items: Sequence[TokenizedExample] | ReadsSeveral[bytes]
    collate: Callable[[Any], Batch]
    parts: tuple[Part, ...]
    set_aside: tuple[str, ...]
    length: int | None
    content: str
    count: int
    tokens: int

    @property
    def longest(self) -> Any:
        """An item that has the most tokens; rows that are packed all have as many."""
        if isinstance(self.items, ReadsSeveral):
            return self.items.read([0])[0]
        return max(self.items, key=lambda example: len(example.tokens))


def open_examples(
    source: str | Mapping[str, float], tokenizer: Any, prompt: PromptSection, max_length: int
) -> Examples:
    """Open what `data.train` names: one place, or several with weights; JSONL files, data sets, packed data sets.

    Raises:
      UserError: there is nothing usable in one of them, packed and other data are mixed, or a packed data set was
        made with another tokenizer, template or prompt.
    """
    weights = {source: 1.0} if isinstance(source, str) else source
    datasets = {where: open_dataset(where) for where in weights if is_dataset(where)}
    packed = [where for where in weights if where in datasets and datasets[where].manifest.kind == PACKED]
    if packed and len(packed) < len(weights):
        other = next(where for where in weights if where not in packed)
        raise UserError(f"{packed[0]} is packed and {other} is not; pack both, or neither")
    if packed:
        return _packed({where: datasets[where] for where in weights}, weights, tokenizer, prompt, max_length)
    examples: list[TokenizedExample] = []
    set_aside: list[str] = []
    parts, hashes = [], []
    for where, weight in weights.items():
        digest = hashlib.sha256()
        good, faults = tokenized(where, tokenizer, prompt, max_length, digest)
        hashes.append(digest.hexdigest())
        examples += good
        set_aside += faults
        parts.append((len(good), weight))
    content = _content(hashes, list(weights.values()))
    collate = partial(pad_examples, largest=max_length)
    tokens = sum(len(example.tokens) for example in examples)
    return Examples(examples, collate, tuple(parts), tuple(set_aside), None, content, len(examples), tokens)


def tokenized(
    where: str, tokenizer: Any, prompt: PromptSection, max_length: int, digest: Any = None
) -> tuple[list[TokenizedExample], list[str]]:
    """All examples of a JSONL file or data set that the chat template can render and that are short enough.

    Beside them a line for each record that is skipped.

    To `digest`, a hash of hashlib's, the turns of those examples are added.

    Raises:
      UserError: no example is.
    """
    records = load_records(SftExample, where)
    examples, faults, unfit = [], list(records.set_aside), ""
    end_of_turn_id(tokenizer)  # a template that is broken for all is one error
    opened_text(tokenizer, prompt.thinking)
    for record in records.good:
        try:
            example = tokenize_example(tokenizer, record.messages, prompt)
        except UserError as error:
            faults.append(f"{where}: record {record.id}: {error}")
            unfit = unfit or faults[-1]
            continue
        if len(example.tokens) > max_length:
            faults.append(
                f"{where}: record {record.id}: {len(example.tokens)} tokens, over data.max_length {max_length}"
            )
        else:
            examples.append(example)
            if digest is not None:
                turns = [(message.role, message.content) for message in record.messages]
                digest.update(json.dumps(turns, ensure_ascii=False).encode() + b"\n")
    if not examples:
        raise UserError(unfit or f"{where}: no example has at most data.max_length {max_length} tokens")
    return examples, faults


def _packed(
    datasets: Mapping[str, Dataset],
    weights: Mapping[str, float],
    tokenizer: Any,
    prompt: PromptSection,
    max_length: int,
) -> Examples:
    lengths = {
        where: check_packing(where, dataset.manifest, tokenizer, prompt, max_length).length
        for where, dataset in datasets.items()
    }
    length = max(lengths.values())
    parts = tuple((len(dataset), weights[where]) for where, dataset in datasets.items())
    hashes = [
        hashlib.sha256(repr([(s.records, s.bytes, s.crc32c) for s in dataset.manifest.shards]).encode()).hexdigest()
        for dataset in datasets.values()
    ]
    content = _content(hashes, [weights[where] for where in datasets])
    packings = [dataset.manifest.packing for dataset in datasets.values()]
    count, tokens = (sum(getattr(packing, name) for packing in packings) for name in ("examples", "tokens"))
    rows = _Joined(list(datasets.values()))
    return Examples(rows, partial(unpacked_rows, length=length), parts, (), length, content, count, tokens)


def _content(hashes: Sequence[str], weights: Sequence[float]) -> str:
    """Of a mixture: of what its parts hold, and their shares."""
    shares = [weight / sum(weights) for weight in weights]
    return hashlib.sha256(repr(list(zip(hashes, shares, strict=True))).encode()).hexdigest()[:16]


class _Joined:
    """Several data sets one after the other."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets

    def __len__(self) -> int:
        return sum(map(len, self._datasets))

    def read(self, indices: Sequence[int]) -> list[bytes]:
        found: dict[int, bytes] = {}
        first = 0
        for dataset in self._datasets:
            wanted = {index: index - first for index in indices if first <= index < first + len(dataset)}
            found |= zip(wanted, dataset.read(list(wanted.values())), strict=True)
            first += len(dataset)
        return [found[index] for index in indices]


def next_token_loss(
    config: ModelConfig, execution: Execution, parameters: Parameters, batch: dict[str, jax.Array]
) -> tuple[jax.Array, None]:
    """Sum of `weights` × negative log-likelihood of each token given those before it.

    Args:
      config, execution: the model and how it computes.
      parameters: what is trained.
      batch: `tokens`, `segments`, `positions` int32 and `weights` float32, [rows, length]; the weight of a token
        counts at its own place.
    """
    model = bind(config, parameters)
    hidden = model(batch["tokens"], batch["segments"], batch["positions"], execution)
    scores = token_scores(model, hidden[:, :-1], batch["tokens"][:, 1:], execution)
    return -jnp.sum(scores.log_probs * batch["weights"][:, 1:]), None


def make_sft_step(
    config: ModelConfig,
    execution: Execution,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: TrainState,
    micro_batches: int,
) -> Any:
    """The jitted `(state, batch, base) -> (state, metrics)`; the old state's memory is given to the new one.

    `base`: the parameters that those of the state, then adapters, are added to; None: the state has all.
    """

    @partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, execution.sharding.named()),
        compiler_options=execution.sharding.compiler_options,
    )
    def step(
        state: TrainState, batch: dict[str, jax.Array], base: Parameters | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(parameters: Parameters, batch: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return next_token_loss(config, execution, joined(base, parameters), batch)

        value, _, gradients = accumulate_gradients(
            loss, state.parameters, _weighted(batch), micro_batches, execution.sharding, shardings.parameters
        )
        metrics = {
            "loss": value,
            "learning_rate": schedule(updates_counted(state.optimizer_state)),
            "num_tokens": jnp.sum(batch["segments"] > 0),
        }
        state, norm, applied = apply_gradients(optimizer, state, value, gradients)
        metrics |= {"grad_norm": norm, "skipped_updates": 1.0 - applied}
        return TrainState(state.step + 1, state.parameters, state.optimizer_state), metrics

    return step


def step_flops(model: ModelConfig, examples: int, metrics: dict[str, float]) -> float:
    """FLOPs of the model in one step, forward and backward, padding and remat aside.

    Attention is counted at the rows' mean length, so a packed row counts as one example: a little too much.
    """
    tokens = metrics["num_tokens"]
    return update_passes(model.adapter) * (causal_flops(model, examples, tokens / examples) + head_flops(model, tokens))


def train_sft(config: SftConfig, profile_steps: int = 0, accepted: Collection[str] = ()) -> None:
    """Run SFT as `config` says, or resume it; see `psyche sft --help`.

    Args:
      config: the run.
      profile_steps: how many to trace.
      accepted: what may have changed, of `run_changes.CHANGES`.

    Raises:
      UserError: the model, the data or the run folder cannot be used.
    """
    longest = (config.data.max_length, "data.max_length")
    setup = prepare(config.model, config.mesh, *longest, as_path(config.run.dir), adapter=config.adapter)
    execution = setup.execution

    # What cannot work is said before the work begins.
    micro_batch = config.rows_per_micro_batch
    check_rows(micro_batch, "micro_batch_size", execution.sharding)
    train = open_examples(config.data.train, setup.tokenizer, config.prompt, config.data.max_length)
    faults = list(train.set_aside)
    evaluation: list[TokenizedExample] = []
    evaluation_content: str | None = None
    if config.data.evaluation is not None:
        digest = hashlib.sha256()
        evaluation, more = tokenized(
            config.data.evaluation, setup.tokenizer, config.prompt, config.data.max_length, digest
        )
        faults += more
        evaluation_content = digest.hexdigest()[:16]

    # The step, and what it starts from.
    total_steps = config.count_steps(len(train.items))
    schedule = make_schedule(config.optimizer, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    abstract, shardings = abstract_state(setup, optimizer)
    base = setup.read_base()
    step = make_sft_step(
        setup.config,
        execution,
        optimizer,
        schedule,
        shardings,
        config.batch_size // micro_batch,
    )
    place = execution.sharding.named("batch", "sequence")
    evaluate = jax.jit(lambda parameters, batch: next_token_loss(setup.config, execution, parameters, batch)[0])

    def device_batches(first: int) -> Iterator[dict[str, jax.Array]]:
        # Packed rows all have one length, so a host needs no others than its own to know a batch's shape.
        rows = slice(0, config.batch_size) if train.length is None else hosts.own_rows(place, config.batch_size)
        stream = batches(
            train.items,
            config.batch_size,
            config.run.seed,
            train.collate,
            range(first, total_steps),
            train.parts,
            rows,
            config.data.prefetch_batches,
        )
        return (hosts.place(batch, place, rows.start, config.batch_size) for batch in stream)

    def evaluation_loss(state: TrainState, check_stop: Callable[[], None]) -> dict[str, float | None]:
        total = tokens = 0.0
        for batch in _evaluation_batches(evaluation, micro_batch, config.data.max_length):
            check_stop()
            batch = _counted(batch)
            total += float(evaluate(joined(base, state.parameters), hosts.place(batch, place)))
            tokens += float(batch["weights"][:, 1:].sum())
        return {"evaluation_loss": total / tokens}

    def lower_largest(state: TrainState) -> Iterator[Any]:
        longest = train.collate([train.longest] * config.batch_size)
        yield step.lower(state, hosts.place(longest, place), base)
        if evaluation:
            longest_there = max(evaluation, key=lambda example: len(example.tokens))
            batch = next(_evaluation_batches([longest_there], micro_batch, config.data.max_length))
            yield evaluate.lower(joined(base, state.parameters), hosts.place(_counted(batch), place))

    # The loop.
    values = config_to_dict(config)
    contents = trained_on(setup, config.prompt, train.content, evaluation_content)
    folder = as_path(config.run.dir)
    with (
        open_run(folder, "sft", values, config.logging, contents, accepted) as run,
        listening(run.write_last_words) as stop,
    ):
        keep_tokenizer(run, setup)
        report_skipped(run, schedule_warning(config.optimizer, total_steps), faults)
        metadata = checkpoint_metadata(
            setup.config,
            config.prompt,
            config=values,
            seed=config.run.seed,
            started_from=config.model.path,
            contents=contents,
            **about_base(setup, contents),
        )
        with Training(
            "sft",
            run,
            stop,
            header=[*header(setup), *_about_data(config, train, len(evaluation), total_steps)],
            total_steps=total_steps,
            metadata=metadata,
            checkpoints=config.checkpoints,
            max_skipped_steps=config.optimizer.max_skipped_steps,
            evaluation=Evaluation(config.evaluate_every_steps, evaluation_loss, "evaluation_loss", False)
            if evaluation
            else None,
            headline=("loss", "evaluation_loss", "grad_norm"),
            flops=partial(step_flops, setup.config, config.batch_size),
            memory_settings="set model.remat=full, a smaller micro_batch_size or more devices (all of which a run that "
            "goes on may change), or a smaller data.max_length",
            profile_steps=profile_steps,
        ) as this:
            if this.finished():
                return
            state = this.begin(
                lambda: initial_state(optimizer, setup.read_trained(config.run.seed), shardings),
                abstract,
                lower_largest,
            )
            for _, batch in this.steps(device_batches(this.first)):
                state, metrics = step(state, batch, base)
                this.end_step(state, this.measured(metrics))


def _about_data(config: SftConfig, train: Examples, held_out: int, total_steps: int) -> list[str]:
    """Lines for the header."""
    items, size = len(train.items), config.batch_size
    packed = f" in {items:,} rows of {train.length}" if train.length is not None else ""
    skipped = f", {len(train.set_aside)} skipped" if train.set_aside else ""
    evaluated = f"; evaluated on {held_out:,} examples every {config.evaluate_every_steps} steps" if held_out else ""
    each = "examples" if train.length is None else "rows"
    return [
        f"data: {train.count:,} examples, {train.tokens:,} tokens{packed}{skipped}",
        f"steps: {total_steps}, of {size} {each} each; {items / size:.4g} an epoch{evaluated}",
    ]


def _weighted(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Weights that make the sum of the losses the mean over all learned tokens of the batch."""
    mask = batch["loss_mask"].astype(jnp.float32)
    arrays = {name: batch[name] for name in ("tokens", "segments", "positions")}
    return {**arrays, "weights": mask / jnp.maximum(mask[:, 1:].sum(), 1.0)}


def _counted(batch: Batch) -> Batch:
    """With weights that make the sum of the losses that over all learned tokens."""
    return {**batch, "weights": batch["loss_mask"].astype("float32")}


def _evaluation_batches(examples: Sequence[TokenizedExample], rows: int, max_length: int) -> Iterator[Batch]:
    """All examples once; the last batch is filled up with rows that do not count."""
    for start in range(0, len(examples), rows):
        part = list(examples[start : start + rows])
        missing = rows - len(part)
        batch = pad_examples(part + part[:1] * missing, max_length)
        batch["loss_mask"][len(part) :] = False
        yield batch
