"""`psyche plan`: compile a training program for a TPU slice that is not there, and say what it takes.

`slices` knows the chips, `compile` makes the program, `hlo` reads its text: `collectives` finds what it sends and
copies, `forecast` how long it takes by the compiler's cycles. `roofline` counts how long it must take at least, with
the steps of decoding that `rollout` simulates. `report` puts them together, `search` looks for settings that fit.
"""
