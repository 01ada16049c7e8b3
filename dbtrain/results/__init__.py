"""What a subject leaves behind: checkpoints, weights, card, sheets, record; and its use afterwards."""
