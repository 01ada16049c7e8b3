"""What training writes for a subject: checkpoints, weights, card, sheets, record; and the use of finished subjects."""
