"""Objectives, SFT, GRPO, optimizer, checkpoints and the loop that they share."""
