"""How fast the real programs are on a random model of any shape: what `psyche bench` runs."""
