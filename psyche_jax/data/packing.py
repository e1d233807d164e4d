"""Packing: tokenized examples put side by side into rows of one length, once and ahead of training.

A packed record is one row. On disk it is int32, little-endian: the number of tokens and of examples, the tokens, the
length of each example; then the loss mask, a bit a token. Segments and positions follow from the lengths, so they are
not stored.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from psyche_jax.config import PackConfig, PromptSection
from psyche_jax.config_files import config_to_dict
from psyche_jax.data.chat import TokenizedExample, end_of_turn_id, opened_text, tokenize_example
from psyche_jax.data.dataset import Manifest, Packing, load_records, write_contents
from psyche_jax.data.records import SftExample
from psyche_jax.data.streams import Batch
from psyche_jax.errors import UserError
from psyche_jax.storage.files import as_path, bucket_errors

PACKED = "Packed"  # the kind that manifests name


def pack(config: PackConfig) -> tuple[Manifest, list[str]]:
    """Tokenize, pack and write a data set.

    All tokens are in memory: five bytes each.

    Returns:
      The manifest, and a line for each record that was skipped.

    Raises:
      UserError: the input holds nothing usable, or `out` is taken or cannot be written to.
    """
    tokenizer = _load_tokenizer(config.tokenizer)
    records = load_records(SftExample, config.input)
    set_aside = list(records.set_aside)
    examples: list[TokenizedExample] = []
    cut, unfit = 0, ""
    end_of_turn_id(tokenizer)  # a template that is broken for all is one error
    opened_text(tokenizer, config.prompt.thinking)

    # What is too long is skipped or cut, as the config says; a cut that leaves nothing to learn is skipped as well.
    for record in tqdm(records.good, desc="pack", unit="example", disable=None):
        try:
            example = tokenize_example(tokenizer, record.messages, config.prompt)
        except UserError as error:
            set_aside.append(f"{config.input}: record {record.id}: {error}")
            unfit = unfit or set_aside[-1]
            continue
        if (length := len(example.tokens)) > config.max_length:
            shorter = TokenizedExample(example.tokens[: config.max_length], example.loss_mask[: config.max_length])
            where = f"{config.input}: record {record.id}: {length} tokens, over max_length {config.max_length}"
            if config.too_long == "set_aside":
                set_aside.append(where)
                continue
            if not shorter.loss_mask.any():
                set_aside.append(f"{where}, and nothing to learn before the cut")
                continue
            cut += 1
            example = shorter
        examples.append(example)
    if not examples:
        raise UserError(unfit or f"{config.input}: no example has at most max_length {config.max_length} tokens")

    # The manifest keeps what made the rows, so that a run with another tokenizer or template refuses them.
    rows = best_fit([len(example.tokens) for example in examples], config.max_length)
    tokens = sum(len(example.tokens) for example in examples)
    packing = Packing(
        length=config.max_length,
        examples=len(examples),
        tokens=tokens,
        padding_share=1 - tokens / (len(rows) * config.max_length),
        set_aside=len(set_aside),
        cut=cut,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        template_sha256=template_hash(tokenizer, config.prompt),
    )
    contents = (packed_row([examples[index] for index in row]) for row in rows)
    manifest = write_contents(
        config.out, PACKED, contents, config_to_dict(config), config.shard_mib * 2**20, packing=packing
    )
    return manifest, set_aside


def _load_tokenizer(path: str) -> Any:
    from psyche_jax.model.huggingface import load_tokenizer

    folder = as_path(path)
    with bucket_errors(folder):
        inside = [folder / "tokenizer", folder / "checkpoints" / "tokenizer"]  # of a checkpoint, of a run
        return load_tokenizer(next((place for place in inside if place.is_dir()), folder))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows that each begin with the longest example left and are then filled as full as the others allow.

    Examples whose lengths differ little, as those of a questionnaire, leave best-fit decreasing, which takes them one
    by one, with gaps of half an example; choosing them together (a subset sum) does not.

    Args:
      lengths: of the examples, from 1 to `capacity`.
      capacity: tokens of a row.

    Returns:
      The indices of each row's examples.
    """
    waiting: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], -index)):
        waiting.setdefault(lengths[index], []).append(index)
    rows = []
    while waiting:
        longest = next(iter(waiting))
        row = [waiting[longest].pop()]
        for length, count in _fullest({n: len(of) for n, of in waiting.items() if of}, capacity - longest).items():
            row += [waiting[length].pop() for _ in range(count)]
        for length in {lengths[index] for index in row}:
            if not waiting[length]:
                del waiting[length]
        rows.append(row)
    return rows


def _fullest(counts: dict[int, int], space: int) -> dict[int, int]:
    """How many of each length to take so that their sum comes nearest to `space`, and not over it."""
    below = (1 << space + 1) - 1
    sums = 1  # bit s: some of the lengths so far add up to s
    seen: list[tuple[int, int]] = []
    for length, count in counts.items():
        if length > space:
            continue
        seen.append((length, sums))
        for _ in range(min(count, space // length)):
            more = sums | sums << length & below
            if more == sums:
                break
            sums = more
        if sums >> space:
            break
    total = sums.bit_length() - 1
    taken: dict[int, int] = {}
    for length, before in reversed(seen):
        while not before >> total & 1:
            total -= length
            taken[length] = taken.get(length, 0) + 1
    return taken


def packed_row(examples: Sequence[TokenizedExample]) -> bytes:
    """The examples of one row as they are stored."""
    tokens = np.concatenate([example.tokens for example in examples]).astype("<i4")
    lengths = np.asarray([len(example.tokens) for example in examples], "<i4")
    mask = np.concatenate([example.loss_mask for example in examples])
    header = np.asarray([len(tokens), len(lengths)], "<i4")
    return b"".join(part.tobytes() for part in (header, tokens, lengths, np.packbits(mask)))


def unpacked_rows(contents: Sequence[bytes], length: int) -> Batch:
    """Rows as training takes them: `tokens`, `segments` (1, 2, …; 0 on padding), `positions` int32 and `loss_mask`
    bool, [rows, length].

    Raises:
      ValueError: a content is not a row of at most that length.
    """
    batch: Batch = {name: np.zeros((len(contents), length), np.int32) for name in ("tokens", "segments", "positions")}
    batch["loss_mask"] = np.zeros((len(contents), length), bool)
    for row, content in enumerate(contents):
        size, examples = np.frombuffer(content, "<i4", 2)
        if len(content) != 8 + 4 * (size + examples) + -(-size // 8) or size > length:
            raise ValueError(f"{len(content)} bytes are not a packed row of {length} tokens")
        lengths = np.frombuffer(content, "<i4", examples, 8 + 4 * size)
        starts = np.cumsum(lengths) - lengths
        batch["tokens"][row, :size] = np.frombuffer(content, "<i4", size, 8)
        batch["segments"][row, :size] = np.repeat(np.arange(1, examples + 1, dtype=np.int32), lengths)
        batch["positions"][row, :size] = np.arange(size, dtype=np.int32) - np.repeat(starts, lengths)
        mask = np.frombuffer(content, np.uint8, -1, 8 + 4 * (size + examples))
        batch["loss_mask"][row, :size] = np.unpackbits(mask, count=int(size))
    return batch


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of all that turns text into ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def template_hash(tokenizer: Any, prompt: PromptSection) -> str:
    """SHA-256 of all that turns turns into text: the chat template and its switch, system prompt, instruction."""
    parts = [tokenizer.chat_template or "", prompt.system, prompt.instruction]
    if prompt.thinking is not None:  # else the hash is that of versions that had no such setting
        parts.append(f"thinking {prompt.thinking}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def check_packing(where: str, manifest: Manifest, tokenizer: Any, prompt: PromptSection, max_length: int) -> Packing:
    """How a packed data set was made, if it is fit for a run.

    Raises:
      UserError: it is not packed, or with another tokenizer, template or prompt, or its rows are longer.
    """
    packing = manifest.packing
    if packing is None:
        raise UserError(f"{where}: holds records of {manifest.kind}, which are not packed")
    for what, theirs, ours in (
        ("tokenizer", packing.tokenizer_sha256, tokenizer_hash(tokenizer)),
        ("chat template or prompt", packing.template_sha256, template_hash(tokenizer, prompt)),
    ):
        if theirs != ours:
            how = "psyche pack" + (", with this run's prompt.* keys" if "prompt" in what else "")
            raise UserError(f"{where}: was packed with a different {what} than this run's; pack it again ({how})")
    if packing.length > max_length:
        raise UserError(f"{where}: its rows have {packing.length} tokens, over data.max_length {max_length}")
    return packing
