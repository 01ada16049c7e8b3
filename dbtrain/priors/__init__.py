"""Class priors: their store, how they are drawn, and a user's own images."""

BLOCK = 16
"""Images of a block of the store: enough to keep a device busy, few enough to lose little when a run is stopped."""
