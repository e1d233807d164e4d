"""Synthesis: source texts to SFT and RL records, by any LLM that speaks the OpenAI protocol."""
