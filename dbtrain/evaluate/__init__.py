"""Evaluation by the DreamBooth paper's protocol: features of images and texts, and the scores computed from them."""

RESULT = "evaluation.json"
"""Name of the file with the scores: of one subject in the subject's folder, of a run in the run's folder."""
