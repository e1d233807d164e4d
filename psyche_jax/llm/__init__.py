"""Servers of LLMs behind the OpenAI protocol, as synthesis, evaluation and `psyche chat` ask them.

`server` makes one request, `reply` reads what comes, `retries` says what is asked again and when, `objects` finds the
JSON in what an LLM said.
"""
