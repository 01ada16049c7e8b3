"""Fused operations of dbtrain. Each is optional: its plain PyTorch form is its specification, oracle and CPU path."""
