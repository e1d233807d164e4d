"""`psyche plan`: compile a training program for a TPU slice that is not there, and say what it takes.

`slices` knows the chips, `compile` makes the program, `collectives` reads what it sends, `roofline` counts what it must
take at least, `report` puts them together and searches for settings that fit.
"""
