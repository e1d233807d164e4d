"""SFT and GRPO.

Read `grpo` first: an iteration from top to bottom, one XLA program; `objectives` has its losses. `sft` and `grpo_run`
are the two runs, from a config to a trained model, over what they share: `setup` (mesh, model, tokenizer), `state`
(optimizer, gradients), `loop` (resume, log, evaluate, save). `checkpoints`, `step_folders` and `streaming` write and
read models, `runs`, `run_files` and `run_changes` the folder of a run; `progress` says how far it is; `hosts` and
`preemption` are for several processes and for being told to stop.
"""
