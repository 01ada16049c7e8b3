"""Class priors: their store, how they are drawn, and a user's own images."""
