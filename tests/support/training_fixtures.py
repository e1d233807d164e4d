"""A tiny Qwen2 with its tokenizer, records for it, and configs: what the tests of training share."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from psyche_jax.config import (
    CheckpointSection,
    GrpoConfig,
    GrpoDataSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    PromptSection,
    RunSection,
    SftConfig,
    SftDataSection,
)
from psyche_jax.config_files import config_to_dict, dump_yaml
from psyche_jax.data.records import Message, RlPrompt, SftExample, write_records
from psyche_jax.demo import train_tokenizer
from psyche_jax.model.config import ModelConfig
from psyche_jax.model.huggingface import load_tokenizer, write_weights
from psyche_jax.model.qwen2 import Execution, initialize
from psyche_jax.model.sharding import training_sharding
from psyche_jax.rewards import LengthRule, PatternRule, RepetitionRule
from psyche_jax.train.checkpoints import Checkpoints
from psyche_jax.train.run_files import read_lines
from psyche_jax.train.runs import PreemptedError

PROMPT = PromptSection(system="专家。", instruction="想：")
QUESTIONS = (
    "什么是记忆？",
    "忘",
    "记忆有几种？请说。",
    "心理学研究什么？",
    "情绪",
    "什么是情绪调节？",
    "答案是？",
    "梦",
)
ANSWERS = ("是A。", "情绪是B", "记忆有两种。", "C", "心理", "答案：AB", "不知道。", "是梦。")
VOCABULARY = 304  # a few more than the tokenizer has, as in Qwen2.5
# Rules whose values differ between the garbage that a random model says, so that advantages are not all zero.
RULES = (
    PatternRule(pattern="[ -~]*", name="ascii", weight=1.0),
    RepetitionRule(ngram=1, weight=-0.7),
    LengthRule(max_length=6, buffer=5, weight=0.9),
)


def execution(
    devices: int = 8,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    remat: str = "none",
    decoding_tensor: int | None = None,
) -> Execution:
    """How to compute on the first so many devices."""
    sharding = training_sharding(data, fsdp, tensor, decoding_tensor, jax.devices()[:devices])
    return Execution(sharding, jnp.dtype("float32"), remat)  # type: ignore[arg-type]


def make_model(folder: Path, vocabulary: int = VOCABULARY) -> ModelConfig:
    """Write tokenizer and random weights; logits are spread enough for probabilities to differ."""
    folder.mkdir(parents=True)
    texts = [
        *["system\nuser\nassistant\n"] * 9,
        PROMPT.system,
        *(PROMPT.instruction + question for question in QUESTIONS),
        *ANSWERS,
    ]
    tokens = train_tokenizer(texts, 296, folder)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        **tokens,
    )
    parameters = initialize(config, jax.random.key(7), execution(1).sharding, jnp.float32)
    parameters = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, parameters)
    # ASCII and both stop tokens are said often, so that responses differ in what rules look at.
    tokens_by_text = load_tokenizer(folder).get_vocab()
    often = [token for text, token in tokens_by_text.items() if len(text) == 1 and text < "\x7f"]
    head = parameters["head"].at[jnp.asarray([*often, *config.stop_token_ids])].multiply(4)
    write_weights(folder, config, {**parameters, "head": head})
    return config


def write_sft_data(path: Path, count: int = 20) -> list[SftExample]:
    """Conversations of one and two turns."""
    examples = []
    for index in range(count):
        turns = [
            Message("user", QUESTIONS[index % 8]),
            Message("assistant", ANSWERS[index // 2 % 8] + str(index)),
        ]
        if index % 3 == 0:
            turns += [Message("user", "还有？"), Message("assistant", "没有。")]
        examples.append(SftExample(tuple(turns)))
    write_records(path, examples)
    return examples


def write_prompts(path: Path, count: int = 16) -> list[RlPrompt]:
    """Questions with keys."""
    prompts = [
        RlPrompt((Message("user", QUESTIONS[index % 8] + str(index)),), "ABCD"[index % 4], "single")
        for index in range(count)
    ]
    write_records(path, prompts)
    return prompts


def sft_config(root: Path, run: str = "run", **changes: Any) -> SftConfig:
    """SFT of the model in `root / "model"` on `root / "sft.jsonl"`: 3 steps an epoch."""
    config = SftConfig(
        run=RunSection(str(root / run), 3),
        model=ModelSection(str(root / "model")),
        data=SftDataSection(str(root / "sft.jsonl"), max_length=96),
        epochs=2.0,
        batch_size=8,
        prompt=PROMPT,
        optimizer=OptimizerSection(learning_rate=1e-2),
        checkpoints=CheckpointSection(every_steps=3),
    )
    return dataclasses.replace(config, **changes)


def grpo_config(root: Path, run: str = "run", **changes: Any) -> GrpoConfig:
    """GRPO of the same model on `root / "rl.jsonl"`, 8 prompts × 4 responses a step."""
    config = GrpoConfig(
        run=RunSection(str(root / run), 3),
        model=ModelSection(str(root / "model")),
        data=GrpoDataSection(str(root / "rl.jsonl"), 64),
        epochs=2.0,
        prompts_per_step=8,
        generations_per_prompt=4,
        max_new_tokens=6,
        objective=ObjectiveSection(kl_coefficient=0.05),
        rewards=RULES,
        prompt=PROMPT,
        optimizer=OptimizerSection(learning_rate=1e-2, schedule="constant", warmup=0),
        checkpoints=CheckpointSection(every_steps=2),
    )
    return dataclasses.replace(config, **changes)


def write_config(config: Any, path: Path) -> Path:
    """The config as a YAML file."""
    path.write_text(dump_yaml(config_to_dict(config)), encoding="utf-8")
    return path


def state_of(run: Path) -> dict[str, Any]:
    """The run's `state.json`."""
    return json.loads((run / "state.json").read_text(encoding="utf-8"))


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The run's metrics without what depends on the clock."""
    clock = ("memory/host_gib", "step_time", "tokens_per_second", "tokens_per_second_per_device", "mfu", "compilations")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_lines(run / "metrics.jsonl")]


@contextlib.contextmanager
def stopped_when_restored() -> Iterator[None]:
    """Within the block a run that goes on stops as soon as its checkpoint is read: nothing is compiled."""
    restore = Checkpoints.restore

    def once(*arguments: Any) -> None:
        restore(*arguments)
        raise PreemptedError("far enough")

    with mock.patch.object(Checkpoints, "restore", once):
        yield


def restored(train: Callable[..., None], config: Any, **more: Any) -> None:
    """Start a run that has a checkpoint, and stop it where that is restored."""
    with stopped_when_restored(), contextlib.suppress(PreemptedError):
        train(config, **more)
    assert state_of(Path(config.run.dir))["reason"] == "far enough"


def largest_difference(left: Any, right: Any) -> float:
    """Over all leaves of two trees of the same structure; each leaf's difference relative to its largest value."""

    def difference(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max() / max(np.abs(a).max(), np.abs(b).max(), 1e-30))

    assert jax.tree.structure(left) == jax.tree.structure(right)
    return max(jax.tree.leaves(jax.tree.map(difference, left, right)))
