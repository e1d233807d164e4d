"""Ask a model the questions of a benchmark, score its answers, and write the report.

Read `evaluation` first: it asks a model (`local`, `endpoint`) the tasks of a benchmark (`benchmarks`, `tasks`) and
scores what it said (`extraction`, `score`; `empathy` by judges). `report` makes one page of run folders: `run_records`
reads them, `comparison` sets models side by side, `curves` draws, `pieces` are what it shares with `psyche watch`,
`language` has its words.
"""
