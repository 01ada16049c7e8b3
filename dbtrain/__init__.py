"""dbtrain: distributed DreamBooth training. One personalized text-to-image model per subject of a manifest."""

__version__ = "0.1.0"
