"""All records that a table gives, written at once, with a share of them held out that training does not contain."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from psyche_jax.config_files import config_to_dict
from psyche_jax.data.dataset import write_dataset
from psyche_jax.data.decontamination import decontaminate
from psyche_jax.data.imports import DialogueRemarks, Imported, NoRecordsError, Notes
from psyche_jax.data.mapping import ImportConfig, no_record, records_of
from psyche_jax.data.records import (
    BaseRecord,
    Dialogue,
    Question,
    RlPrompt,
    SftExample,
    question_to_rl,
    question_to_sft,
    turns_of,
)
from psyche_jax.data.text import comparable
from psyche_jax.errors import UserError
from psyche_jax.storage.files import as_path, new_folder, write_text

SKIPPED = "skipped.txt"
HELD_OUT = "held_out"
_NOUNS: Mapping[type[BaseRecord], str] = {Question: "question", Dialogue: "dialogue", RlPrompt: "prompt"}
_SAME_BEGINNING = 32  # comparable characters: texts that share as many are on one case, or one question


def import_parts(source: str, target: str, config: ImportConfig, share: float) -> Imported:
    """Write what the rows of a source give as data sets in a new folder, which appears as a whole.

    Questions give `questions`, `rl`, `sft` (those with a rationale) and `held_out`, which holds questions too; prompts
    with a key `rl` and `held_out`; dialogues `sft` and `held_out`. All records are in memory.

    Args:
      source: see `sources.read_rows`.
      target: a new local folder or gs://bucket/prefix.
      config: how rows become records; its `record` is null.
      share: of the records that are held out, 0 to below 1; see `hold_out`.

    Raises:
      NoRecordsError: the source has no usable row.
      UserError: it cannot be read, or the target cannot be written.
      UsageError: the config names a column that is not there.
    """
    notes, remarks = Notes(), DialogueRemarks()
    with new_folder(as_path(target)) as folder:
        placed = list(records_of(source, config, notes))
        if not placed:
            raise NoRecordsError(no_record(source, config, notes), notes)
        records = [record for _, record in placed]
        said = list(_fewer_options(records, config))

        # What is nearly the same as something held out is in neither part: it would leak, or be asked twice.
        held, train = hold_out(records, share)
        if share and not held:
            said.append("nothing is held out: all rows are about one case, or begin the same way")
        if held:
            found = decontaminate(train, held)
            left_out = {leak.train_id for leak in found.leaks}
            train = list(found.clean)
            for where, record in placed:
                if record.id in left_out:
                    notes.note(where, f"nearly the same as a held-out {_NOUNS[type(record)]}")
        if not train:
            why = "all are held out; set a smaller --hold-out"
            if others := len(records) - len(held):
                why = (
                    f"the other {others} are nearly the same as one of the {len(held)} held out; set --hold-out 0, or "
                    "a larger share, so that what most of them begin or end with is told from what they say"
                )
            raise UserError(f"{source}: nothing is left to train on: {why}")

        # The folder appears with all its data sets or not at all.
        for record in records:
            remarks.see(record)
        parts = {**_training_parts(train), HELD_OUT: held}
        if isinstance(train[0], Question) and (without := len(train) - len(parts["sft"])):
            said.append(
                f"sft holds {len(parts['sft'])} of {len(train)} questions: {without} have no rationale to learn from"
            )
        origin = {"source": source, "import": config_to_dict(config), "hold_out": share}
        manifests = {name: write_dataset(str(folder / name), part, origin) for name, part in parts.items() if part}
        if notes.set_aside:
            write_text(folder / SKIPPED, "".join(f"{line}\n" for line in notes.set_aside))
    return Imported(manifests, tuple(notes.set_aside), +notes.faults, (*said, *remarks.lines()))


def hold_out(records: Sequence[BaseRecord], share: float) -> tuple[list[BaseRecord], list[BaseRecord]]:
    """Part records into those held out and the others, each in their order.

    Records on the same case stay together, and so do those whose texts begin alike: the same question in another
    spelling, a case that is told in the stem. Which are held out depends on texts alone, not on the order of rows.

    Args:
      records: of any kind.
      share: of them to hold out; whole groups, in the order of their hashes, as long as they fit.

    Returns:
      Those held out, and the others. With a share above 0 at least one group is held out, if there are two.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        groups[hashlib.sha256(_beginning(record).encode()).hexdigest()].append(number)
    held: set[int] = set()
    wanted = round(share * len(records))
    for group in sorted(groups):
        if len(held) + len(groups[group]) <= wanted:
            held.update(groups[group])
    if share and not held and len(groups) > 1:
        held.update(groups[min(groups, key=lambda group: (len(groups[group]), group))])
    return (
        [record for number, record in enumerate(records) if number in held],
        [record for number, record in enumerate(records) if number not in held],
    )


def _beginning(record: BaseRecord) -> str:
    if isinstance(record, Question):
        text = str(record.meta.get("case") or record.stem)
    else:
        text = "".join(turn.content for turn in turns_of(record) if turn.role == "user")
    return comparable(text)[:_SAME_BEGINNING] or text


def _training_parts(records: Sequence[BaseRecord]) -> dict[str, Sequence[BaseRecord]]:
    questions = [record for record in records if isinstance(record, Question)]
    dialogues = [record for record in records if isinstance(record, Dialogue)]
    if questions:
        sft = [question_to_sft(question) for question in questions if question.rationale]
        return {"questions": questions, "sft": sft, "rl": [question_to_rl(question) for question in questions]}
    if dialogues:
        return {"sft": [SftExample(dialogue.turns, dialogue.source, dialogue.meta) for dialogue in dialogues]}
    return {"rl": records}


def _fewer_options(records: Sequence[BaseRecord], config: ImportConfig) -> list[str]:
    """How often columns of options are empty."""
    columns = config.columns.options
    if not isinstance(columns, tuple):
        return []
    counts = [len(record.options) for record in records if isinstance(record, Question)]
    empty = {column: sum(count <= place for count in counts) for place, column in enumerate(columns)}
    named = ", ".join(f"{column} in {count}" for column, count in empty.items() if count)
    return [f"empty options, ignored: {named} of {len(counts)} questions"] if named else []
