"""Psyche-R1 in JAX: from a Qwen or Llama base model to a domain reasoning model on a TPU."""

import os

# PyTorch is not needed, so transformers need not say at every start that it is absent.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
