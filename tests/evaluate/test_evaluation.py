"""Completions and whole evaluations of a tiny random model."""

import json

import jax
import jax.numpy as jnp
import pytest
from tiny import save_model

from psyche_jax.config import PromptSection
from psyche_jax.data.chat import prompt_tokens
from psyche_jax.data.records import Message, question_text
from psyche_jax.errors import UserError
from psyche_jax.evaluate.completions import complete
from psyche_jax.evaluate.evaluation import evaluate_model, read_bench, save_evaluation
from psyche_jax.model.decoding import Sampling
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.qwen2 import Execution
from psyche_jax.model.sharding import TRAIN_RULES, Sharding, make_mesh
from psyche_jax.train.checkpoints import open_model

NEW_TOKENS = 24
PROMPTS = ["问", "为什么", "what is it?", "x" * 20, "答", "心理", "B", "长" * 6, "A", "为"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Many ids end a response, so that greedy decoding ends some of them."""
    return save_model(
        tmp_path_factory.mktemp("tiny") / "model", stop_token_ids=tuple(range(297, 300)) + tuple(range(9))
    )


@pytest.fixture(scope="module")
def run(model):
    """Completions by batch size, devices and sampling, each computed once."""
    stored = open_model(str(model))
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    known = {}

    def completions(batch_size=4, devices=8, new_tokens=NEW_TOKENS, temperature=0.0, seed=0, order=1):
        key = (batch_size, devices, new_tokens, temperature, seed, order)
        if key not in known:
            sharding = Sharding(make_mesh(devices=jax.devices()[:devices]), TRAIN_RULES)
            parameters = stored.read_parameters(sharding, jnp.dtype("float32"))
            execution = Execution(sharding, jnp.dtype("float32"))
            sampling = Sampling(new_tokens, temperature)
            done = []
            result = complete(
                stored.config,
                parameters,
                tokenizer,
                prompts[::order],
                sampling,
                execution,
                batch_size,
                seed,
                done.append,
            )
            assert sum(done) == len(prompts)
            known[key] = result
        return known[key]

    return completions


def test_greedy_does_not_depend_on_batches_or_devices(run):
    expected = run(batch_size=64, devices=1)
    assert len(expected) == len(PROMPTS)
    assert len({completion.text for completion in expected}) > len(PROMPTS) // 2, "too alike to tell their order"
    for batch_size, devices in ((1, 1), (3, 1), (3, 8)):
        assert run(batch_size, devices) == expected


def test_completions_come_in_the_order_of_the_prompts(run):
    assert sorted(PROMPTS, key=len) not in (PROMPTS, PROMPTS[::-1])
    assert run(64, 1, order=-1) == run(64, 1)[::-1]


def test_finished_means_a_stop_token(run):
    completions = run(batch_size=64, devices=1)
    finished = [completion for completion in completions if completion.finished]
    assert 0 < len(finished) < len(completions)
    for completion in completions:
        assert completion.tokens <= NEW_TOKENS
        assert completion.finished or completion.tokens == NEW_TOKENS
    # A response that ended with its n-th token does so too where n tokens are allowed, and not where n - 1 are.
    index = next(i for i, completion in enumerate(completions) if completion.finished and completion.tokens > 1)
    length = completions[index].tokens
    assert run(64, 1, length)[index] == completions[index]
    cut = run(64, 1, length - 1)[index]
    assert (cut.finished, cut.tokens, cut.text) == (False, length - 1, completions[index].text)


def test_sampling_depends_on_the_seed_alone(run):
    texts = [[completion.text for completion in run(64, 1, temperature=1.0, seed=seed)] for seed in (0, 1)]
    greedy = [completion.text for completion in run(64, 1)]
    assert len({tuple(some) for some in (*texts, greedy)}) == 3


@pytest.fixture(scope="module")
def questions():
    good = read_bench("samples").good
    return [next(q for q in good if q.kind == kind) for kind in ("single", "multi")] + list(good[:3])


def evaluate(model, questions, **changes):
    options = {"label": "tiny", "batch_size": 8, **changes}
    return evaluate_model(str(model), "samples", questions, Sampling(4, 0.0), **options)


def test_a_whole_evaluation(model, questions):
    found = evaluate(model, questions)
    assert json.loads(json.dumps(found)) == found
    assert (found["label"], found["model"], found["bench"], found["step"]) == ("tiny", str(model), "samples", 0)
    assert found["sampling"]["temperature"] == 0.0
    items = found["items"]
    assert [item["id"] for item in items] == [question.id for question in questions]
    assert [item["gold"] for item in items] == [question.answer for question in questions]
    assert [item["question"] for item in items] == [question_text(question) for question in questions]
    scores = found["scores"]
    assert scores["count"] == len(questions) == sum(part["count"] for part in scores["by_kind"].values())
    assert scores["strict"] == sum(item["strict"] for item in items) / len(items)
    assert scores["unanswered"] == sum(item["predicted"] is None for item in items)
    assert evaluate(model, questions) == found


def test_the_prompt_that_a_model_was_trained_with_is_used(model, questions, monkeypatch):
    """`psyche_prompt.json` of the folder, unless another is given; the defaults where there is none."""
    from psyche_jax.evaluate import evaluation

    asked = []
    tokenizer = load_tokenizer(model)

    def instead(config, parameters, tokenizer, prompts, *rest):
        asked.append(prompts)
        raise StopIteration

    monkeypatch.setattr(evaluation, "complete", instead)
    own, given = PromptSection("自己的", "先想。"), PromptSection("给的", "")
    file = model / "psyche_prompt.json"
    for stored, argument, expected in (
        (None, None, PromptSection()),
        (own, None, own),
        (own, given, given),
    ):
        file.unlink(missing_ok=True)
        if stored is not None:
            file.write_text(json.dumps({"system": stored.system, "instruction": stored.instruction}))
        with pytest.raises(StopIteration):
            evaluate(model, questions, prompt=argument)
        turns = [[Message("user", question_text(question))] for question in questions]
        assert asked.pop() == [prompt_tokens(tokenizer, turn, expected) for turn in turns]
    file.unlink()


def test_what_does_not_fit_the_model(model, questions):
    places = open_model(str(model)).config.max_position_embeddings
    with pytest.raises(UserError, match=rf"samples: a question of \d+ tokens .* the {places} positions"):
        evaluate_model(str(model), "samples", questions, Sampling(places), label="x")


def test_saving(tmp_path):
    evaluation = {"bench": "data/held out.jsonl", "label": "a/b", "scores": {}}
    path = save_evaluation(tmp_path, evaluation)
    assert path == tmp_path / "evaluations" / "held out-a-b.json"
    assert json.loads(path.read_text()) == evaluation
    assert save_evaluation(tmp_path, evaluation) == path
