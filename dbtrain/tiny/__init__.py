"""Paths of the embedded base: a small real text-to-image model that ships with dbtrain.

Every path is a `pathlib.Path` inside the installed package; nothing is loaded, nothing heavy is imported.
"""

from pathlib import Path

EMBEDDED = "embedded"
"""What settings and options call these models, and the base among them; no path, whatever lies in the folder."""
ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
"""The pipeline folder: `StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)`."""
UPSCALER = ASSETS / "upscaler"
"""The pipeline folder of what enlarges the base's pictures to 128 pixels: `IFSuperResolutionPipeline`."""
NAMED = {EMBEDDED: BASE, f"{EMBEDDED}-upscaler": UPSCALER}
"""The pipeline folders by what settings and options call them."""
CLIP = ASSETS / "clip"
"""The CLIP-style pair of the evaluation protocol (`CLIPModel` and its image processor)."""
IDENTITY = ASSETS / "identity"
"""The identity encoder of the evaluation protocol (`ViTModel`, DINO's role)."""
DEMO = ASSETS / "demo" / "subjects.csv"
"""Demo manifest (subject,class,images): drawn subjects of art sets the base has never seen."""
DEMO_LARGE = ASSETS / "demo" / "large" / "subjects.csv"
"""The same subjects and layouts at 128 pixels, for the upscaler."""
DEMO_REAL = ASSETS / "demo" / "real.csv"
"""Demo manifest of real photographs: exercises the pipeline, not the eye."""
