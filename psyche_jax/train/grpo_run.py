"""A run of GRPO: what `train/grpo.py` is given from a config and its files, and what becomes of its outputs."""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from psyche_jax.config import GrpoConfig
from psyche_jax.config_files import config_to_dict
from psyche_jax.data.chat import decoded_text, opened_text, prompt_tokens
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import RlPrompt, answer_mask
from psyche_jax.data.streams import Batch, batches, pad_prompts
from psyche_jax.errors import UserError
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.flops import causal_flops, head_flops, update_passes
from psyche_jax.model.sharding import Sharding
from psyche_jax.rewards.functions import LoadedFunction, call_functions, load_functions, sources_hash
from psyche_jax.rewards.score import CompiledRules, compile_rules
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer
from psyche_jax.storage.files import as_path
from psyche_jax.train import hosts
from psyche_jax.train.checkpoints import checkpoint_metadata
from psyche_jax.train.grpo import Iteration
from psyche_jax.train.loop import Evaluation, Training
from psyche_jax.train.objectives import total_rewards
from psyche_jax.train.preemption import listening
from psyche_jax.train.runs import open_run
from psyche_jax.train.setup import (
    Setup,
    about_base,
    abstract_state,
    check_grpo_rows,
    header,
    keep_tokenizer,
    prepare,
    report_skipped,
    trained_on,
)
from psyche_jax.train.state import TrainState, initial_state, make_optimizer, make_schedule, schedule_warning

Judge = Callable[[Sequence[int], Any, Any], tuple[dict[str, np.ndarray], dict[str, float]]]

StepFunction = Callable[[TrainState, Any, int], tuple[TrainState, dict[str, Any]]]

Lower = Callable[[TrainState, dict[str, jax.Array]], Iterator[Any]]

_EQUAL_STEPS = 10  # so many steps whose rewards teach nothing are worth a warning


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with its record."""

    tokens: list[int]
    record: RlPrompt
    number: int  # its place in the data


def train_grpo(config: GrpoConfig, profile_steps: int = 0, accepted: Collection[str] = ()) -> None:
    """Run GRPO as `config` says, or resume it; see `psyche grpo --help`.

    Args:
      config: the run.
      profile_steps: how many to trace.
      accepted: what may have changed, of `run_changes.CHANGES`.

    Raises:
      UserError: the model, the data, a rule or the run folder cannot be used.
    """
    setup = prepare(
        config.model,
        config.mesh,
        config.data.max_prompt_length + config.max_new_tokens,
        "data.max_prompt_length + max_new_tokens",
        as_path(config.run.dir),
        config.rollout.tensor,
        config.adapter,
    )
    execution = setup.execution
    model = setup.config

    # What cannot work is said before the work begins: shapes that the mesh does not divide, rules, functions, data.
    check_grpo_rows(config, execution.sharding)
    token_bytes = token_bytes_from_tokenizer(setup.tokenizer, model.vocab_size)
    opened = opened_text(setup.tokenizer, config.prompt.thinking)
    rules = compile_rules(config.rules, token_bytes, model.stop_token_ids, opened=opened)
    functions = load_functions(config.functions)
    prompts, skipped = tokenized_prompts(setup.tokenizer, config, config.data.train)
    faults = list(skipped)
    held_out: list[Prompt] = []
    if config.data.evaluation is not None:
        held_out, more = tokenized_prompts(setup.tokenizer, config, config.data.evaluation)
        held_out, seen = without_trained(held_out, prompts, config.data.evaluation)
        faults += [*more, *seen]

    # The iteration, and what it starts from. The reference is the model as it is now, read once more; under adapters
    # it is read only once, since their base never changes.
    total_steps = config.count_steps(len(prompts))
    schedule = make_schedule(config.optimizer, total_steps, config.updates_per_step)
    optimizer = make_optimizer(config.optimizer, schedule)
    abstract, shardings = abstract_state(setup, optimizer)
    iteration = Iteration(config, model, execution, optimizer, schedule, shardings)
    reference = setup.read_base()
    if reference is None and config.objective.kl_coefficient:
        reference = setup.read_parameters(config.reference_dtype)
    key = jax.random.key(config.run.seed)
    collate = partial(_collate, largest=config.data.max_prompt_length)
    place = execution.sharding.named("batch")

    def device_batches(first: int) -> Iterator[dict[str, jax.Array]]:
        stream = batches(prompts, config.candidates_per_step, config.run.seed, collate, range(first, total_steps))
        return (hosts.place(batch, place) for batch in stream)

    # Functions of the host need to see the responses between sampling and learning, so they cut the program in two.
    if functions:
        judge = partial(judged, functions, setup, opened, prompts)
        step, lower = _two_programs(iteration, reference, rules, key, judge)
    else:
        step, lower = _one_program(iteration, reference, rules, key)
    evaluation = None
    if held_out:
        judge = partial(judged, functions, setup, opened, held_out)
        program = jax.jit(iteration.evaluate, out_shardings=execution.sharding.named())

        def answer(trained: Any, *rest: Any) -> Any:
            return program(iteration.policy(reference, trained), *rest)

        measure = partial(held_out_reward, answer, config, execution.sharding, rules, held_out, judge)
        evaluation = Evaluation(config.evaluate_every_steps, measure, "evaluation_reward", True)
    warn = _Warnings()

    def lower_largest(state: TrainState) -> Iterator[Any]:
        yield from lower(state, hosts.place(collate([_longest(prompts)] * config.candidates_per_step), place))
        if held_out:
            batch = hosts.place(collate([_longest(held_out)] * config.prompts_per_step), place)
            yield program.lower(iteration.policy(reference, state.parameters), rules, batch)

    # The loop. Keys are folded in by step, so that a run that is resumed draws what it would have drawn.
    values = config_to_dict(config)
    contents = trained_on(setup, config.prompt, _content(prompts), _content(held_out) if held_out else None)
    if functions:
        contents["rewards"] = sources_hash(functions)[:16]
    folder = as_path(config.run.dir)
    with (
        open_run(folder, "grpo", values, config.logging, contents, accepted) as run,
        listening(run.write_last_words) as stop,
    ):
        keep_tokenizer(run, setup)
        report_skipped(run, schedule_warning(config.optimizer, total_steps, config.updates_per_step), faults)
        metadata = checkpoint_metadata(
            model,
            config.prompt,
            config=values,
            seed=config.run.seed,
            reference=config.model.path,
            contents=contents,
            **about_base(setup, contents),
        )
        with Training(
            "grpo",
            run,
            stop,
            header=[*header(setup), *_about_data(config, prompts, len(skipped), len(held_out), total_steps)],
            total_steps=total_steps,
            metadata=metadata,
            checkpoints=config.checkpoints,
            max_skipped_steps=config.optimizer.max_skipped_steps,
            evaluation=evaluation,
            headline=("reward", "evaluation_reward", "kl", "completions/mean_length"),
            flops=partial(step_flops, model, config),
            memory_settings="set model.remat=full, a smaller micro_batch_prompts, fewer rollout.slots or more devices "
            "(all of which may change when a run resumes), or a smaller max_new_tokens or data.max_prompt_length",
            profile_steps=profile_steps,
        ) as this:
            if this.finished():
                return
            state = this.begin(
                lambda: initial_state(optimizer, setup.read_trained(config.run.seed), shardings),
                abstract,
                lower_largest,
            )
            for index, batch in this.steps(device_batches(this.first)):
                state, outputs = step(state, batch, index - 1)
                metrics = this.measured(outputs["metrics"], outputs.get("absent"))
                warn.look_at(index, metrics)
                if index in (1, total_steps) or index % config.logging.samples_every_steps == 0:
                    group = config.generations_per_prompt
                    for sample in decoded_samples(setup.tokenizer, opened, outputs["samples"], group):
                        run.log_sample(index, {"policy_step": index - 1, **sample})
                this.end_step(state, metrics)


def _about_data(
    config: GrpoConfig, prompts: Sequence[Prompt], skipped: int, held_out: int, total_steps: int
) -> list[str]:
    """Lines for the header."""
    tokens, candidates = sum(len(prompt.tokens) for prompt in prompts), config.candidates_per_step
    evaluated = f"; evaluated on {held_out:,} prompts every {config.evaluate_every_steps} steps" if held_out else ""
    return [
        f"data: {len(prompts):,} prompts, {tokens:,} tokens{f', {skipped} skipped' if skipped else ''}",
        f"steps: {total_steps}, of {candidates} prompts × {config.generations_per_prompt} responses each; "
        f"{len(prompts) / candidates:.4g} an epoch{evaluated}",
    ]


def _one_program(
    iteration: Iteration, reference: Any, rules: CompiledRules, key: jax.Array
) -> tuple[StepFunction, Lower]:
    """A step, and what lowers its program for a batch of some shape."""
    program = iteration.program()

    def step(state: TrainState, batch: dict[str, jax.Array], index: int) -> tuple[TrainState, dict[str, Any]]:
        return program(state, reference, rules, batch, jax.random.fold_in(key, index))

    def lower(state: TrainState, batch: dict[str, jax.Array]) -> Iterator[Any]:
        if isinstance(program, jax.stages.Wrapped):
            yield program.lower(state, reference, rules, batch, jax.random.fold_in(key, 0))

    return step, lower


def _two_programs(
    iteration: Iteration, reference: Any, rules: CompiledRules, key: jax.Array, judge: Judge
) -> tuple[StepFunction, Lower]:
    """The same with functions between sampling and learning."""
    sample, learn = iteration.programs()
    everywhere = iteration.execution.sharding.named()

    def step(state: TrainState, batch: dict[str, jax.Array], index: int) -> tuple[TrainState, dict[str, Any]]:
        policy = iteration.policy(reference, state.parameters)
        sampled = sample(policy, rules, batch, jax.random.fold_in(key, index))
        numbers, tokens, mask = jax.device_get(
            (sampled.prompts["number"], sampled.rollout.tokens, sampled.rollout.mask)
        )
        values, failures = judge(numbers, tokens, mask)
        state, outputs = learn(state, reference, sampled, hosts.place(values, everywhere))
        return state, {**outputs, "metrics": {**outputs["metrics"], **failures}}

    def lower(state: TrainState, batch: dict[str, jax.Array]) -> Iterator[Any]:
        policy = iteration.policy(reference, state.parameters)
        arguments = (policy, rules, batch, jax.random.fold_in(key, 0))
        yield sample.lower(*arguments)
        sampled = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(sample, *arguments),
        )
        shape = (iteration.config.prompts_per_step, iteration.config.generations_per_prompt)
        values = {function.name: np.zeros(shape, np.float32) for function in iteration.config.functions}
        yield learn.lower(state, reference, sampled, hosts.place(values, everywhere))

    return step, lower


def judged(
    functions: Sequence[LoadedFunction],
    setup: Setup,
    opened: str,
    prompts: Sequence[Prompt],
    numbers: Any,
    tokens: Any,
    mask: Any,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What the functions say of responses. The first process asks them, and tells the others.

    Args:
      functions, setup: the functions; the tokenizer and the model's stop tokens.
      opened: what the chat template has written of each response.
      prompts: where `numbers` point.
      numbers: int [prompts], which prompts these are.
      tokens, mask: [responses, length], the responses to one prompt consecutive.

    Returns:
      By name, values float32 [prompts, generations], NaN where a function gave None; and by name of a metric, whether
      the function failed.

    Raises:
      UserError: a function failed, and is to end the run then.
    """
    generations = len(tokens) // len(numbers)
    shape = (len(numbers), generations)
    values = {function.reward.name: np.zeros(shape, np.float32) for function in functions}
    failures = {name: np.float32(0) for name in values}
    error = None
    if hosts.is_first():
        asked = [prompts[number] for number in np.repeat(numbers, generations)]
        texts = [decoded_text(setup.tokenizer, prompt.tokens) for prompt in asked]
        completions = [opened + _without_stop(setup, row[row_mask]) for row, row_mask in zip(tokens, mask, strict=True)]
        try:
            found = call_functions(functions, texts, completions, [dataclasses.asdict(p.record) for p in asked])
        except UserError as stop:
            error = stop
        else:
            for name, result in found.items():
                if result.fault:
                    print(f"grpo: {result.fault}; its reward is missing in this step", file=sys.stderr, flush=True)
                failures[name] = np.float32(bool(result.fault))
                numbers_or_nan = [math.nan if value is None else value for value in result.values]
                values[name] = np.asarray(numbers_or_nan, np.float32).reshape(shape)
    if hosts.on_any(error is not None):
        raise error or UserError("a reward function failed on the first host")
    values, failures = hosts.from_first((values, failures))
    return values, {f"rewards/{name}/failed": float(failed) for name, failed in failures.items()}


def _without_stop(setup: Setup, tokens: np.ndarray) -> str:
    stops = setup.model.config.stop_token_ids
    return decoded_text(setup.tokenizer, tokens[:-1] if len(tokens) and tokens[-1] in stops else tokens)


def held_out_reward(
    program: Any,
    config: GrpoConfig,
    sharding: Sharding,
    rules: CompiledRules,
    prompts: Sequence[Prompt],
    judge: Judge,
    state: TrainState,
    check_stop: Callable[[], None],
) -> dict[str, float | None]:
    """Rewards of one greedy response to each held-out prompt: the mean of the totals, and of each reward.

    Where a function failed there is no mean of the totals: without its part it could not be compared with others.

    `program` is `Iteration.evaluate`, jitted; `check_stop` is called before each batch, and raises to end this.
    """
    parts: list[dict[str, np.ndarray]] = []
    lengths: list[int] = []
    failed = False
    for start in range(0, len(prompts), config.prompts_per_step):
        check_stop()
        numbers = list(range(start, min(start + config.prompts_per_step, len(prompts))))
        filled = [prompts[number] for number in numbers] + [prompts[0]] * (config.prompts_per_step - len(numbers))
        batch = hosts.place(_collate(filled, config.data.max_prompt_length), sharding.named("batch"))
        rollout, by_rule = jax.device_get(program(state.parameters, rules, batch))
        rows = slice(len(numbers))
        values = {name: value[rows, None] for name, value in by_rule.items()}
        if config.functions:
            of_functions, failures = judge(numbers, rollout.tokens[rows], rollout.mask[rows])
            values |= of_functions
            failed = failed or any(failures.values())
        parts.append(values)
        lengths += rollout.mask[rows].sum(axis=1).tolist()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    total, counted = jax.device_get(total_rewards(joined, {reward.name: reward.weight for reward in config.rewards}))
    metrics: dict[str, float | None] = {"evaluation_reward": None if failed else _mean(total[counted])}
    metrics |= {f"evaluation_rewards/{name}/mean": _mean(v[~np.isnan(v)]) for name, v in joined.items()}
    return {**metrics, "evaluation_completions/mean_length": _mean(lengths)}


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def step_flops(model: ModelConfig, config: GrpoConfig, metrics: dict[str, Any]) -> float:
    """FLOPs of the model in one iteration: sampling, log-probs, forward and backward; padding and remat aside.

    A prompt counts once for all of its responses. Attention is counted at the mean lengths: a little too little where
    they differ. What dynamic sampling threw away does not count.
    """
    responses = config.prompts_per_step * config.generations_per_prompt
    response = metrics["completions/mean_length"]
    prompt = metrics["num_tokens"] / responses - response
    forward = causal_flops(model, config.prompts_per_step, prompt)
    forward += causal_flops(model, responses, response, prompt) + head_flops(model, responses * response)
    trained = update_passes(model.adapter) + (config.objective.top_entropy < 1)
    fixed = (config.objective.kl_coefficient > 0) + config.old_log_probs_share
    return forward * (1 + fixed + trained * config.passes_per_step)


class _Warnings:
    """Warns, once, of many steps in a row in which all rewards of each group were equal; and of steps without a
    response to learn from: of the first, the tenth, the hundredth and so on."""

    def __init__(self) -> None:
        self._steps = 0
        self._empty = 0

    def look_at(self, index: int, metrics: dict[str, Any]) -> None:
        """At the metrics of one more step."""
        if metrics["reward"] is None or metrics["loss"] is None:
            self._empty += 1
            if self._empty == 10 ** (len(str(self._empty)) - 1):
                hosts.say(
                    f"grpo: step {index} had no response to learn from, so it changed nothing "
                    f"({self._empty} such steps since the start; see empty_updates in metrics.jsonl)"
                )
        self._steps = self._steps + 1 if metrics["frac_reward_zero_std"] == 1 else min(self._steps, 0)
        if self._steps == _EQUAL_STEPS:
            self._steps = -sys.maxsize
            hosts.say(
                f"grpo: in {_EQUAL_STEPS} steps in a row all responses to each prompt had the same reward: there was "
                "nothing to learn; see in samples.jsonl whether the rewards are out of the policy's reach"
            )


def decoded_samples(
    tokenizer: Any, opened: str, samples: dict[str, Any], generations: int, prompts: int = 2
) -> Iterator[dict[str, Any]]:
    """Text, rewards and advantages of all responses to the first few prompts of a step.

    A completion begins with what the chat template has `opened` of it, and ends with its stop token if it has one.
    """
    rows = jax.device_get(samples)

    def number(value: np.floating) -> float | None:
        return None if np.isnan(value) else float(value)

    for row in range(min(prompts * generations, len(rows["tokens"]))):
        prompt = row // generations
        yield {
            "prompt": decoded_text(tokenizer, rows["prompts"][prompt][rows["prompt_mask"][prompt]]),
            "completion": opened + decoded_text(tokenizer, rows["tokens"][row][rows["mask"][row]]),
            "tokens": int(rows["mask"][row].sum()),
            "token_ids": rows["tokens"][row][rows["mask"][row]].tolist(),
            "reward": float(rows["rewards"][row]),
            "rewards": {name: number(values[row]) for name, values in rows["rewards_by_rule"].items()},
            "advantage": float(rows["advantages"][row]),
        }


def tokenized_prompts(tokenizer: Any, config: GrpoConfig, path: str) -> tuple[list[Prompt], list[str]]:
    largest = config.data.max_prompt_length
    records = load_records(RlPrompt, path)
    prompts: list[Prompt] = []
    faults = list(records.set_aside)
    unfit = ""
    opened_text(tokenizer, config.prompt.thinking)  # a template that is broken for all is one error
    for record in records.good:
        try:
            tokens = prompt_tokens(tokenizer, record.messages, config.prompt)
        except UserError as error:
            faults.append(f"{path}: record {record.id}: {error}")
            unfit = unfit or faults[-1]
            continue
        if len(tokens) > largest:
            faults.append(f"{path}: record {record.id}: {len(tokens)} tokens, over data.max_prompt_length {largest}")
        else:
            prompts.append(Prompt(tokens, record, len(prompts)))
    if not prompts:
        raise UserError(unfit or f"{path}: no prompt has at most data.max_prompt_length {largest} tokens")
    return prompts, faults


def _longest(prompts: Sequence[Prompt]) -> Prompt:
    return max(prompts, key=lambda prompt: len(prompt.tokens))


def _content(prompts: Sequence[Prompt]) -> str:
    """A hash of the records of prompts, in order: reward functions see all of a record."""
    digest = hashlib.sha256()
    for record in (prompt.record for prompt in prompts):
        turns = [(message.role, message.content) for message in record.messages]
        content = (turns, record.answer, record.kind, record.source, record.meta)
        digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def without_trained(held_out: list[Prompt], trained: list[Prompt], path: str) -> tuple[list[Prompt], list[str]]:
    """Held-out prompts that are not trained on, numbered anew, and a line for each that is."""
    known = {tuple(prompt.tokens) for prompt in trained}
    kept = [prompt for prompt in held_out if tuple(prompt.tokens) not in known]
    faults = [
        f"{path}: record {prompt.record.id}: is in data.train too, so it is not held out"
        for prompt in held_out
        if tuple(prompt.tokens) in known
    ]
    if not kept:
        raise UserError(f"{path}: all of its prompts are in data.train too; data.evaluation must be held out")
    return [dataclasses.replace(prompt, number=number) for number, prompt in enumerate(kept)], faults


def _collate(prompts: list[Prompt], largest: int) -> Batch:
    answers = np.asarray([answer_mask(prompt.record.answer) for prompt in prompts], np.int32)
    numbers = np.asarray([prompt.number for prompt in prompts], np.int32)
    return {**pad_prompts([prompt.tokens for prompt in prompts], largest), "answers": answers, "number": numbers}
