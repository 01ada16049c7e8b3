"""Programs that start `dbtrain` on one or many machines. A launcher is one file, which turns a plan into text, and one
row."""

from dbtrain_launchers import on_deepspeed, on_kubernetes, on_ray, on_slurm
from dbtrain_launchers.plan import Launcher

LAUNCHERS: dict[str, Launcher] = {
    "deepspeed": on_deepspeed.LAUNCHER,
    "ray": on_ray.LAUNCHER,
    "slurm": on_slurm.LAUNCHER,
    "kubernetes": on_kubernetes.LAUNCHER,
}
"""All launchers by their name in `dbtrain launch NAME`."""
