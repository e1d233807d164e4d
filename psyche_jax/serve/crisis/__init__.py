"""Signs of a crisis in what a person writes, and of harm in what a model says: rules in data files, fixed answers."""

from psyche_jax.serve.crisis.classify import Assessment, Risk, classify

__all__ = ["Assessment", "Risk", "classify"]
