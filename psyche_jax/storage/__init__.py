"""Files that are whole or absent, on disks and in buckets.

- `files`: written in one step; JSON and JSONL.
- `buckets`: what is tried again in a bucket, how often and for how long.
- `store`: the objects of data sets and checkpoints, with checksums.
- `locks`: one process writes to a run.
- `arrays`: large ones in blocks.
- `hub`: models and rows from the Hugging Face hub, models to it.
"""
