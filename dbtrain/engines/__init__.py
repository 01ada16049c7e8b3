"""Engines execute the training step: gradients, clipping, AdamW, and the state to resume from."""
