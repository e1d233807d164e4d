#!/usr/bin/env bash
# Psyche-R1 from source texts to a 7B model in Hugging Face format, in eight steps.
#
# On a v5litepod-16 the training commands need, by `psyche plan` of the same configs, 8.6 GiB (SFT) and 13.8 GiB (GRPO)
# of the 15.75 GiB of a chip; docs/tpu.md starts them on all hosts of a slice. How many hours that takes nobody has
# measured yet: nothing here has run on a TPU. `psyche plan` prints a lower bound. The paper reports, for its
# model on PCEB, 74.4 % strict and 77.6 % elastic as the average (Qwen2.5-7B-Instruct: 57.9 and 64.6).
#
# Before you start, edit configs/synth.yaml: your source texts (it names the 32 packaged passages), your LLMs (it names
# two of OpenAI and one at 127.0.0.1:8000), their prices and your budget.
#
#   export OPENAI_API_KEY=…
#   scripts/psyche_r1.sh path/to/PCEB
#
# Run it again after a failure: what is whole is kept, and synthesis and runs go on where they stopped.
#
# The same way with a tiny model on a CPU, in minutes: psyche demo.
set -euo pipefail
[ -e "${1-}" ] || { echo "psyche_r1.sh: error: give the folder or zip of PCEB, which the model is measured on" >&2; exit 2; }
benchmark=$(realpath -- "$1")
cd "$(dirname "$0")/.."

# 1. The base: weights and tokenizer of Qwen2.5-7B-Instruct as a checkpoint, where the configs look for it.
[ -e models/Qwen2.5-7B-Instruct ] ||
psyche import hub:Qwen/Qwen2.5-7B-Instruct models/Qwen2.5-7B-Instruct

# 2. Records: questions with rationales and empathetic dialogues; questions that every LLM gets wrong go to RL, the rest to SFT.
psyche synth --config configs/synth.yaml

# 3. What the benchmark asks must not appear in the training data.
[ -e data/pceb/manifest.json ] ||
psyche data import "$benchmark" data/pceb --format pceb
[ -e data/sft/manifest.json ] ||
psyche decontaminate --train data/synth/sft --eval data/pceb --out data/sft
[ -e data/rl/manifest.json ] ||
psyche decontaminate --train data/synth/rl --eval data/pceb --out data/rl

# 4. SFT: two epochs on rationales and dialogues. The model learns to think, to answer, and to listen.
psyche sft --config configs/sft_7b_v5e16.yaml --set data.train=data/sft

# 5. GRPO on what was too hard: eight answers to each question, rewarded for their format and for being right.
psyche grpo --config configs/grpo_7b_v5e16.yaml --set data.train=data/rl

# 6. The benchmark; what the SFT data may still hold of it is reported apart.
psyche eval runs/grpo_7b --bench "pceb:$benchmark" --train data/sft --max-new-tokens 2048

# 7. One page about both runs: curves, samples, scores beside the paper's.
psyche report runs/sft_7b runs/grpo_7b --out report.html

# 8. The model for everyone else: a Hugging Face folder with its card.
[ -e models/psyche-r1 ] ||
psyche export runs/grpo_7b models/psyche-r1 --dtype bfloat16
