"""From tokens to text: whole characters, stop strings, log-probs, and that the cut into chunks changes nothing."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import save_tokenizer
from tokenizers import AddedToken

from psyche_jax.model.huggingface import load_tokenizer
from psyche_jax.rewards.reference import decode
from psyche_jax.rewards.token_bytes import token_bytes_from_tokenizer
from psyche_jax.serve.batcher import Piece
from psyche_jax.serve.crisis.gate import Gate, OutputFilter
from psyche_jax.serve.service import Speech


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def say(tokenizer, text, sizes, stop=(), filtered=False, finish="length", log_probs=False):
    """Text, ending and log-probs of `text` spoken in chunks of `sizes` tokens, over and over."""
    speech = Speech(tokenizer, stop, OutputFilter(Gate(), "zh") if filtered else None, log_probs)
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown, entries, place, turn = "", [], 0, 0
    while speech.finish is None:
        size = sizes[turn % len(sizes)]
        part = ids[place : place + size]
        place, turn = place + size, turn + 1
        last = finish if place >= len(ids) else None
        delta = speech.feed(Piece(0, part, [-1.0] * len(part), [[] for _ in part], last))
        assert "\ufffd" not in delta.text
        shown += delta.text
        entries += delta.log_probs
    return shown, speech.finish, entries


TEXTS = st.text(alphabet="心理学ab 。\n🙂é", max_size=60)
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@given(TEXTS, SIZES)
def test_whole_characters_come_out_and_all_of_them(tokenizer, text, sizes):
    shown, finish, entries = say(tokenizer, text, sizes, log_probs=True)
    assert (shown, finish) == (tokenizer.decode(tokenizer.encode(text)), "length")
    assert len(entries) == len(tokenizer.encode(text))


@given(TEXTS, SIZES, st.lists(st.text(alphabet="心a 。\n🙂", min_size=1, max_size=3), max_size=3))
def test_stop_strings_cut_as_if_all_were_known(tokenizer, text, sizes, stops):
    whole = tokenizer.decode(tokenizer.encode(text))
    places = [whole.index(stop) for stop in stops if stop in whole]
    shown, finish, entries = say(tokenizer, text, sizes, stops, log_probs=True)
    # A stop string may end a chunk earlier than another one that begins before it.
    assert (finish == "stop") == bool(places)
    assert shown == (whole[: len(shown)] if places else whole)
    if len(stops) == 1 and places:
        assert shown == whole[: places[0]]
    assert len(tokenizer.decode([entry.token for entry in entries]).rstrip("\ufffd")) >= len(shown)


@given(st.lists(st.sampled_from(["你好。", "致死剂量是 5 克。", "你患有抑郁症。", "嗯", "\n"]), max_size=8), SIZES)
def test_the_filter_sees_the_same_whatever_the_chunks(tokenizer, parts, sizes):
    text = "".join(parts)
    shown, finish, entries = say(tokenizer, text, sizes, filtered=True, log_probs=True)
    assert (shown, finish) == say(tokenizer, text, [10_000], filtered=True)[:2]
    assert "致死" not in shown and "患有" not in shown
    assert (finish == "content_filter") == ("致死" in text)
    said = tokenizer.decode([entry.token for entry in entries])
    assert "致死" not in said and "患有" not in said, "log-probs tell nothing that was withheld"


def test_bytes_that_are_no_character_end_as_a_mark(tokenizer):
    speech = Speech(tokenizer, (), None)
    first = tokenizer.encode("心", add_special_tokens=False)[:1]
    assert speech.feed(Piece(0, first, [0.0], [[]], None)).text == ""
    assert speech.feed(Piece(0, [], [], [], "length")).text == "\ufffd"


def test_what_the_template_has_opened_comes_first_and_holds_no_stop_string(tokenizer):
    speech = Speech(tokenizer, ("\n", "<think>"), OutputFilter(Gate(), "zh"), True, "<think>\n")
    ids = tokenizer.encode("想</think>好\n", add_special_tokens=False)
    first = speech.feed(Piece(0, [], [], [], None))
    assert (first.text, first.finish) == ("<think>\n", None)
    last = speech.feed(Piece(0, ids, [-1.0] * len(ids), [[] for _ in ids], "length"))
    assert (last.text, last.finish) == ("想</think>好", "stop")
    assert tokenizer.decode([entry.token for entry in last.log_probs]) == "想</think>好"


def test_special_tags_of_a_thought_are_said(tokenizer):
    """As the rewards count them; and no other token is swallowed either."""
    tagged = copy.deepcopy(tokenizer)
    tagged.add_tokens([AddedToken(tag, special=True) for tag in ("<think>", "</think>")])
    text = "<think>想</think>好<|im_start|>"
    assert say(tagged, text, [2])[0] == text
    bytes_ = token_bytes_from_tokenizer(tagged)
    ids = tagged.encode("<think>想</think>好", add_special_tokens=False)
    assert decode(ids, bytes_) == say(tagged, "<think>想</think>好", [1])[0]
