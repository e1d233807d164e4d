"""Qwen2.5 in Flax NNX: architecture, attention, sharding, decoding and Hugging Face conversion."""
