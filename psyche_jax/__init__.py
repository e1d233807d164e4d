"""Psyche-R1 in JAX: from a Qwen2.5 base model to a domain reasoning model on a TPU."""

__version__ = "0.1.0"
