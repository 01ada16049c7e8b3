"""dbtrain: distributed DreamBooth training. One personalized text-to-image model per subject of a manifest.

    result = dbtrain.train_subject("photos/rex", "dog", out="runs/rex", config="sd15_lora")
    result.pipeline()(prompt=result.caption).images[0].save("rex.png")

The names below are those of `dbtrain.api`, which is loaded when one of them is first used. docs/api.md.
"""

import pkgutil

__version__ = "0.1.0"
API = ("ConfigError", "DataError", "DbtrainError", "EngineError", "Result", "Stop", "StopRequested", "Trained",
       "load", "score", "train_manifest", "train_subject")  # fmt: skip


def __getattr__(name: str) -> object:
    if name in API:
        return pkgutil.resolve_name(f"dbtrain.api:{name}")
    raise AttributeError(f"module 'dbtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *API]
