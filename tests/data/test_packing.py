"""Packing: every token once, whole examples, little padding; a packed row is its examples side by side."""

import itertools
import json
import shutil
from functools import partial
from importlib.resources import files

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.bucket import running_bucket
from support.tiny import save_tokenizer

from psyche_jax.cli import main
from psyche_jax.config import PromptSection
from psyche_jax.data.chat import TokenizedExample, tokenize_example
from psyche_jax.data.dataset import (
    MANIFEST,
    Packing,
    load_records,
    open_dataset,
    verify_dataset,
    write_contents,
    write_dataset,
)
from psyche_jax.data.packing import PACKED, PackConfig, best_fit, pack, packed_row, unpacked_rows
from psyche_jax.data.records import Dialogue, Message, Question, SftExample, question_to_sft, write_records
from psyche_jax.data.streams import batches
from psyche_jax.errors import UserError
from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.train.sft import open_examples

PROMPT = PromptSection("专家。", "想：")


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=9))))
def test_each_row_is_as_full_as_can_be(case):
    capacity, lengths = case
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    left = set(range(len(lengths)))
    for row in rows:
        longest = max(lengths[index] for index in left)
        assert lengths[row[0]] == longest
        rest = [lengths[index] for index in left - {row[0]}]
        sums = {sum(some) for count in range(len(rest) + 1) for some in itertools.combinations(rest, count)}
        assert sum(lengths[index] for index in row) == longest + max(s for s in sums if longest + s <= capacity)
        left -= set(row)


def test_many_examples_leave_next_to_no_padding():
    lengths = np.random.default_rng(0).integers(50, 1800, 5000).tolist()
    rows = best_fit(lengths, 2048)
    assert 1 - sum(lengths) / (len(rows) * 2048) < 0.005


examples = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=6
)


@given(examples, st.integers(0, 9))
def test_a_row_is_its_examples_side_by_side(content, padding):
    row = [
        TokenizedExample(np.asarray([t for t, _ in one], np.int32), np.asarray([m for _, m in one], bool))
        for one in content
    ]
    size = sum(map(len, content))
    batch = unpacked_rows([packed_row(row)], size + padding)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "tokens": (np.int32, (1, size + padding)),
        "segments": (np.int32, (1, size + padding)),
        "positions": (np.int32, (1, size + padding)),
        "loss_mask": (bool, (1, size + padding)),
    }
    for number, example in enumerate(row, start=1):
        (places,) = np.nonzero(batch["segments"][0] == number)
        assert np.array_equal(batch["tokens"][0, places], example.tokens)
        assert np.array_equal(batch["loss_mask"][0, places], example.loss_mask)
        assert np.array_equal(batch["positions"][0, places], np.arange(len(places)))
    rest = batch["segments"][0] == 0
    assert rest.sum() == padding
    assert not batch["loss_mask"][0, rest].any()
    if size > 1:
        with pytest.raises(ValueError, match="not a packed row"):
            unpacked_rows([packed_row(row)], size - 1)
    with pytest.raises(ValueError, match="not a packed row"):
        unpacked_rows([packed_row(row)[:-1]], size)


def samples() -> list[SftExample]:
    folder = files("psyche_jax.data") / "samples"
    questions = load_records(Question, str(folder / "questions.jsonl")).good
    dialogues = load_records(Dialogue, str(folder / "dialogues.jsonl")).good
    return [question_to_sft(question) for question in questions] + [
        SftExample(dialogue.turns) for dialogue in dialogues
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    save_tokenizer(folder / "tokenizer")
    write_records(folder / "sft.jsonl", samples())
    return folder


def config(made, **changes) -> PackConfig:
    values = {
        "input": str(made / "sft.jsonl"),
        "out": str(made / "packed"),
        "tokenizer": str(made / "tokenizer"),
        "max_length": 2048,
        "prompt": PROMPT,
    }
    shutil.rmtree(made / "packed", ignore_errors=True)
    return PackConfig(**{**values, **changes})


def unpacked(uri) -> list[tuple[bytes, bytes]]:
    """Tokens and mask of every example in a packed data set."""
    dataset = open_dataset(uri)
    batch = unpacked_rows(list(dataset), dataset.manifest.packing.length)
    return [
        (batch["tokens"][row, places].tobytes(), batch["loss_mask"][row, places].tobytes())
        for row, segments in enumerate(batch["segments"])
        for places in (np.flatnonzero(segments == number) for number in range(1, segments.max() + 1))
    ]


def expected(made, records, length=10**9) -> list[tuple[bytes, bytes]]:
    tokenizer = load_tokenizer(made / "tokenizer")
    examples = [tokenize_example(tokenizer, record.messages, PROMPT) for record in records]
    return [(example.tokens[:length].tobytes(), example.loss_mask[:length].tobytes()) for example in examples]


def test_the_sample_data(made):
    """Every example whole and once, and at most 2 % padding: 42.4 rows of tokens in 43."""
    manifest, set_aside = pack(config(made))
    assert set_aside == []
    assert sorted(unpacked(str(made / "packed"))) == sorted(expected(made, samples()))
    assert manifest.packing.padding_share <= 0.02
    assert manifest.packing.examples == len(samples())
    tokens = sum(len(tokens) // 4 for tokens, _ in expected(made, samples()))
    assert manifest.packing.tokens == tokens
    assert manifest.packing.padding_share == pytest.approx(1 - tokens / (manifest.records * 2048))
    values = json.loads((made / "packed" / "manifest.json").read_text())
    assert values["config"]["prompt"] == {"system": "专家。", "instruction": "想：", "thinking": None}
    assert values["kind"] == "Packed"
    assert len(values["packing"]["tokenizer_sha256"]) == 64


def test_long_examples_are_set_aside_or_cut(made):
    lengths = [len(tokens) // 4 for tokens, _ in expected(made, samples())]
    limit = sorted(lengths)[len(lengths) // 2]
    long = sum(length > limit for length in lengths)
    manifest, set_aside = pack(config(made, max_length=limit))
    assert len(set_aside) == manifest.packing.set_aside == long
    assert all(f"tokens, over max_length {limit}" in line for line in set_aside)
    short = [example for example in expected(made, samples()) if len(example[0]) // 4 <= limit]
    assert sorted(unpacked(str(made / "packed"))) == sorted(short)
    manifest, set_aside = pack(config(made, max_length=limit, too_long="cut"))
    assert set_aside == []
    assert manifest.packing.cut == long
    assert sorted(unpacked(str(made / "packed"))) == sorted(expected(made, samples(), limit))


def test_a_cut_that_leaves_nothing_to_learn(made, tmp_path):
    records = [SftExample((Message("user", "长" * 100), Message("assistant", "答"))), samples()[0]]
    write_records(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match="no example has at most max_length 20 tokens"):
        pack(config(made, input=str(tmp_path / "a.jsonl"), max_length=20, too_long="cut"))
    manifest, set_aside = pack(config(made, input=str(tmp_path / "a.jsonl"), max_length=200, too_long="cut"))
    assert manifest.packing.examples == 1
    assert "nothing to learn before the cut" in set_aside[0]


def test_the_same_input_makes_the_same_files(made, tmp_path):
    contents = []
    for name in ("a", "b"):
        pack(config(made, out=str(tmp_path / name)))
        files = sorted((tmp_path / name).iterdir())
        contents.append({path.name: path.read_bytes() for path in files if path.suffix == ".array_record"})
    assert contents[0] == contents[1]


def test_made_for_another_run(made):
    pack(config(made))
    tokenizer = load_tokenizer(made / "tokenizer")
    packed = str(made / "packed")
    assert len(open_examples(packed, tokenizer, PROMPT, 2048).items) == len(open_dataset(packed))
    cases = [
        (
            PromptSection("专家。", "想"),
            tokenizer,
            2048,
            "packed with a different chat template or prompt than this run's",
        ),
        (PROMPT, tokenizer, 2047, "rows have 2048 tokens, over data.max_length 2047"),
    ]
    other = load_tokenizer(made / "tokenizer")
    other.add_tokens(["<new>"])
    cases.append((PROMPT, other, 2048, "packed with a different tokenizer than this run's; pack it again"))
    for prompt, used, length, message in cases:
        with pytest.raises(UserError, match=message):
            open_examples(packed, used, prompt, length)
    with pytest.raises(UserError, match=r"is packed and .* is not; pack both, or neither"):
        open_examples({packed: 1, str(made / "sft.jsonl"): 2}, tokenizer, PROMPT, 2048)


def test_the_command_from_bucket_to_bucket(made, tmp_path, capsys):
    with running_bucket() as bucket:
        write_dataset(f"{bucket}/sft", samples())
        values = {"input": f"{bucket}/sft", "out": f"{bucket}/packed", "tokenizer": str(made / "tokenizer")}
        (tmp_path / "pack.yaml").write_text(yaml.safe_dump({**values, "max_length": 1024}))
        assert main(["pack", "--config", str(tmp_path / "pack.yaml"), "--set", "too_long=cut"]) == 0
        captured = capsys.readouterr()
        packing = open_dataset(f"{bucket}/packed").manifest.packing
        assert f"{packing.padding_share:.2%} padding; 0 skipped" in captured.out
        assert main(["data", "cat", f"{bucket}/packed"]) == 1
        assert "holds packed tokens, not text" in capsys.readouterr().err
        assert main(["data", "verify", f"{bucket}/packed"]) == 0
        assert main(["pack", "--config", str(tmp_path / "pack.yaml")]) == 1
        assert "already holds a data set" in capsys.readouterr().err
    for override, expected in (("max_length=1", "must be at least 2"), ("too_long=x", "too_long"), ("a=1", "'a'")):
        assert main(["pack", "--config", str(tmp_path / "pack.yaml"), "--set", override]) == 2
        assert expected in capsys.readouterr().err


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**7), st.sampled_from(["shard", "shard", "manifest"]))
def test_a_flipped_bit_never_reaches_training(tmp_path, position, which):
    """Batches are as they were packed, or there is one line that names the file; `verify` always names it."""
    place = tmp_path / "flipped"
    if not place.exists():
        random = np.random.default_rng(0)
        rows = [
            packed_row([TokenizedExample(random.integers(0, 150_000, 40, np.int32), np.arange(40) > 9)] * 2)
            for _ in range(60)
        ]
        write_contents(str(place), PACKED, rows, {}, 2500, packing=Packing(80, 120, 4800, 0.0, 0, 0, "", ""))

    def read() -> bytes:
        dataset = open_dataset(str(place))
        stream = batches(dataset, 15, 1, partial(unpacked_rows, length=80), range(4))
        return b"".join(batch[name].tobytes() for batch in stream for name in sorted(batch))

    expected = read()
    shards = sorted(place.glob("*.array_record"))
    path = place / MANIFEST if which == "manifest" else shards[position % len(shards)]
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[position % len(whole)] ^= 1 << position % 8
    path.write_bytes(changed)
    try:
        with pytest.raises(UserError, match=path.name):
            verify_dataset(str(place))
        try:
            assert read() == expected
        except UserError as error:
            assert path.name in str(error)
            assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)
