"""Evaluate a model on a benchmark and write down what it said, question by question."""

import dataclasses
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from psyche_jax.config import Dtype, MeshSection, PromptSection
from psyche_jax.data.chat import prompt_tokens
from psyche_jax.data.records import Message, Question, Records, question_text, read_records
from psyche_jax.errors import UserError
from psyche_jax.evaluate.choice import score_item, summarize
from psyche_jax.evaluate.completions import complete
from psyche_jax.files import write_json
from psyche_jax.model.decoding import Sampling
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.qwen2 import Execution
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, check_mesh_fits, make_mesh
from psyche_jax.train.checkpoints import open_model

SAMPLES = "samples"  # the benchmark that comes with the package


def read_bench(bench: str) -> Records[Question]:
    """The questions of a benchmark: `samples`, or a JSONL file of `Question` records.

    Raises:
      UserError: the file is missing, or holds no usable question.
    """
    path = Path(str(files("psyche_jax.data") / "samples" / "questions.jsonl")) if bench == SAMPLES else Path(bench)
    return read_records(Question, path)


def evaluate_model(
    model_path: str,
    bench: str,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    label: str,
    mesh: MeshSection | None = None,
    compute_dtype: Dtype = "float32",
    batch_size: int = 64,
    seed: int = 0,
    prompt: PromptSection | None = None,
) -> dict[str, Any]:
    """Ask all questions and score the answers.

    Args:
      model_path: a Hugging Face folder, a checkpoint or a run.
      bench: the benchmark's name, for the record.
      questions: what is asked.
      sampling: lengths and temperature.
      label: what the report calls the model.
      mesh: sizes of the mesh's axes; all devices along `fsdp` if None.
      compute_dtype: dtype of activations and of the weights while decoding.
      batch_size: questions at once.
      seed: of sampling.
      prompt: system prompt and instruction; None: those that the model was trained with, else the defaults.

    Returns:
      `label, model, bench, sampling, scores, items`; what `psyche eval --json` prints but for the items.

    Raises:
      UserError: the model cannot be used.
    """
    stored = open_model(model_path)
    mesh = mesh or MeshSection()
    sharding = Sharding(make_mesh(mesh.data, mesh.fsdp, mesh.tensor), TRAIN_RULES)
    check_mesh_fits(sharding.mesh, stored.config)
    tokenizer = load_tokenizer(stored.tokenizer_folder)
    prompt = prompt or stored.prompt or PromptSection()
    prompts = [prompt_tokens(tokenizer, [Message("user", question_text(q))], prompt) for q in questions]
    longest, places = max(map(len, prompts)), stored.config.max_position_embeddings
    if longest + sampling.max_new_tokens > places:
        raise UserError(
            f"{bench}: a question of {longest} tokens and an answer of {sampling.max_new_tokens} do not fit the "
            f"{places} positions of {model_path}; allow fewer new tokens, or take the question out"
        )
    parameters = stored.read_parameters(sharding, jnp.dtype(compute_dtype))
    with tqdm(total=len(prompts), desc=f"eval {label}", unit="question", disable=not sys.stderr.isatty()) as bar:
        completions = complete(
            stored.config,
            parameters,
            tokenizer,
            prompts,
            sampling,
            Execution(sharding, jnp.dtype(compute_dtype)),
            batch_size,
            seed,
            bar.update,
        )
    items = [score_item(question, completion) for question, completion in zip(questions, completions, strict=True)]
    return {
        "label": label,
        "model": model_path,
        "bench": bench,
        "step": int(stored.weights.name) if stored.weights.name.isdecimal() else 0,
        "sampling": dataclasses.asdict(sampling),
        "scores": summarize(questions, items),
        "items": [dataclasses.asdict(item) for item in items],
    }


def save_evaluation(run: Path, evaluation: dict[str, Any]) -> Path:
    """Write an evaluation into a run's folder, where `report` finds it."""
    folder = run / "evaluations"
    folder.mkdir(exist_ok=True)
    name = f"{Path(evaluation['bench']).stem}-{evaluation['label']}.json"
    path = folder / name.replace("/", "-")
    write_json(path, evaluation)
    return path
