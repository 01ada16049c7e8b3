"""Load published files with another environment's diffusers and draw: run by its interpreter, and free of dbtrain."""

import json
import os
import sys
import warnings

import numpy as np
import torch

PROMPT = "a photo of a dog"
NONE = "none"
"""The cell of a version that has no such pipeline."""


def draw(pipeline) -> np.ndarray:
    """One picture [32, 32, 3] in two steps, from fixed noise."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 7.5}
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        return np.asarray(pipeline(prompt=PROMPT, generator=generator, **settings).images[0], dtype=int)


def difference(case: dict[str, str]) -> int | str:
    """The largest difference of a channel from the picture that dbtrain drew, or the error that kept it from that."""
    import diffusers

    kind = getattr(diffusers, case["pipeline"], None)
    if kind is None:
        return NONE
    try:
        if "single" in case:
            pipeline = kind.from_single_file(case["single"], config=case["base"], torch_dtype=torch.float32)
        else:
            pipeline = kind.from_pretrained(case["base"], torch_dtype=torch.float32)
        if "adapter" in case:
            folder, name = os.path.split(case["adapter"])
            pipeline.load_lora_weights(folder, weight_name=name)
        return int(np.abs(draw(pipeline) - np.load(case["ours"])).max())
    except Exception as error:  # any library's; the table shows it
        return repr(error)[:200]


def main() -> None:
    """Print {case: difference} as JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    print(json.dumps({case["name"]: difference(case) for case in cases}))


if __name__ == "__main__":
    main()
