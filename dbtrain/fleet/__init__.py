"""Thousands of subjects over many workers, each finished exactly once or quarantined with a reason."""
