"""`psyche plan`: compile a training program for a TPU slice that is not there, and say what it takes."""
