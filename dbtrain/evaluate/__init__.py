"""Evaluation by the DreamBooth paper's protocol: features of images and texts, and what is counted on them."""
