"""Make training records from source texts with LLMs.

Read `pipeline` first, which has the stages in order and what each depends on; then `steps`, which takes one item
through one stage, and `stages`, which runs a stage over all items into a folder that is whole or absent. `clean`,
`duplicates`, `review` (by people) and `publish` are what needs no LLM.
"""
