"""Talk with a model: an OpenAI-compatible server, the terminal, a web page, and the crisis gate before all of them.

Read `service` first, which takes a request to its answer; then `engine`, which decodes requests together, and `server`,
which puts both behind HTTP (`protocol`: what may be asked; `guard`: who may ask). `chat` is the terminal, `crisis/` the
gate, which synthesis uses too.
"""
