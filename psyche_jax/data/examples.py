"""What SFT trains on: chat records that are tokenized at the start, packed data sets, or mixtures of either."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from psyche_jax.config import PromptSection
from psyche_jax.data.chat import TokenizedExample, end_of_turn_id, tokenize_example
from psyche_jax.data.dataset import Dataset, is_dataset, load_records, open_dataset
from psyche_jax.data.packing import PACKED, check_packing, unpacked_rows
from psyche_jax.data.records import SftExample
from psyche_jax.data.streams import Batch, Part, ReadsSeveral, pad_examples
from psyche_jax.errors import UserError


@dataclass(frozen=True)
class Examples:
    """`items` for `streams.batches`, with what `collate` makes of them.

    `parts` are those of a mixture; `set_aside` names what is not used; `length` is that of packed rows, None if the
    items are single examples; `content` is a hash of what is used, in its order, wherever it lies.
    """

    items: Sequence[TokenizedExample] | ReadsSeveral[bytes]
    collate: Callable[[Any], Batch]
    parts: tuple[Part, ...]
    set_aside: tuple[str, ...]
    length: int | None
    content: str

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
    return Examples(examples, partial(pad_examples, largest=max_length), tuple(parts), tuple(set_aside), None, content)


def tokenized(
    where: str, tokenizer: Any, prompt: PromptSection, max_length: int, digest: Any = None
) -> tuple[list[TokenizedExample], list[str]]:
    """All examples of a JSONL file or data set that the chat template can render and that are short enough.

    Beside them a line for each record that is set aside.

    To `digest`, a hash of hashlib's, the turns of those examples are added.

    Raises:
      UserError: no example is.
    """
    records = load_records(SftExample, where)
    examples, faults, unfit = [], list(records.set_aside), ""
    end_of_turn_id(tokenizer)  # a template that is broken for all is one error
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
    return Examples(_Joined(list(datasets.values())), partial(unpacked_rows, length=length), parts, (), length, content)


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
