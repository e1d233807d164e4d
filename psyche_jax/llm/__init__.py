"""Servers of LLMs: one request, its reply, and what is asked again."""
