"""What models are trained and measured on, from files of any shape to batches.

- `records`: what a question, a dialogue, an SFT example and an RL prompt are; JSONL.
- `dataset`: the same as ArrayRecord shards with a manifest, on disks and in buckets.
- `chat`: turns to tokens, with the loss mask; and back.
- `packing`, `streams`: tokenized examples put into rows; the batch of step n.
- `sources`, `mapping`: rows of any file become records, by a config (`psyche data import --config`).
- `guessing`, `parts`: the config is guessed, all records are written at once (`psyche data import` alone).
- `json_stream`, `public`: CPsyExam, PCEB and SMILE as published (`psyche data import --format`).
- `imports`: what both imports share. `text`, `decontamination`: benchmark questions in training data.
- `samples/`: questions and dialogues that come with the package.
"""
