"""Why attempts end, whether their subjects are to blame, and what becomes of a subject then."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dbtrain.errors import DbtrainError, StopRequested, SubjectTaken
from dbtrain.fleet.schedule import Limits
from dbtrain.storage.trouble import disk_trouble, is_of_one_file, out_of_memory

BLAMED = {
    "disk": False,  # the disk took no more
    "unmounted": False,  # the run's folder is not there on its machine
    "stopped": False,  # its worker was asked to stop
    "killed": False,  # its process was killed from outside
    "device": False,  # its GPU or the driver of that failed
    "file": True,  # the file system refused a file, and the run's folder works
    "oom": True,  # memory ran out
    "crash": True,  # its process died by itself
    "hang": True,  # it made no step within fleet's limit
    "error": True,  # training said why it cannot go on
    "lost": False,  # its worker, its node or another member of its gang was lost
}
"""Whether an attempt's end blames its subject, by the end's cause.

The order is that in which causes explain the end of a gang: where a member was killed the others see errors that follow
from it, and a lost peer explains nothing if another member says why it went.
"""
SUSPICIOUS = 3
"""Losses from outside after which a subject is tried alone, in case the subject itself causes them."""
PEER_SIGNS = ("closed by peer", "reset by peer", "broken pipe", "failed to recv", "remote process exited", "nccl error")
"""What gloo, NCCL and torch's store say, in small letters, when another process of the gang went away."""
DEVICE_SIGNS = ("cuda error", "cublas_status", "cudnn_status", "cusolver_status", "cufft_", "nvrtc error",
                "uncorrectable ecc", "illegal memory access", "unspecified launch failure")  # fmt: skip
"""What CUDA and its libraries say, in small letters, when a GPU or its driver failed."""
PROGRAM_SIGNS = ("device-side assert", "invalid argument", "invalid_value", "invalid configuration", "not_supported")
"""What CUDA and its libraries say when the work that they were given is wrong, which is wrong on any GPU."""


@dataclass(frozen=True)
class End:
    """Why an attempt or a process ended: a cause (a key of `BLAMED`), and a reason for people."""

    cause: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What becomes of a subject whose attempt ended without a result. pack: most rows of its packs from now on."""

    state: Literal["waiting", "quarantined"]
    failures: int
    losses: int
    pack: int | None


def explain(error: BaseException) -> End:
    """The end of a trainer's work by an error."""
    text = " ".join(str(error).split())
    if isinstance(error, StopRequested):
        return End("stopped", text)
    if out_of_memory(error):
        return End("oom", text[:500] or "memory ran out")
    if end := refusal(error):
        return end
    if isinstance(error, SubjectTaken):
        return End("lost", text)  # the worker that had it is not known to be dead
    if isinstance(error, DbtrainError):
        return End("error", text[:2000])
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({Path(where[0].filename).name}:{where[0].lineno})" if where else ""
    return End(_outside(error, text.lower()) or "error", f"{type(error).__name__}: {text[:1000]}{place}")


def _outside(error: BaseException, text: str) -> str | None:
    """The cause of an error that came from another member of the gang or from the GPU; else None."""
    import torch

    if any(sign in text for sign in PEER_SIGNS):
        return "lost"
    device = isinstance(error, getattr(torch, "AcceleratorError", ())) or any(sign in text for sign in DEVICE_SIGNS)
    return "device" if device and not any(sign in text for sign in PROGRAM_SIGNS) else None


def refusal(error: BaseException) -> End | None:
    """The end by an error that comes from what the file system refused; None for any other error. The cause `file` may
    be the trouble of one file, `disk` is that of a whole disk, share or machine."""
    trouble = disk_trouble(error, paths=False)
    return End("file" if is_of_one_file(error) else "disk", trouble) if trouble else None


def end_of_gang(ends: Mapping[int, End], members: int) -> End | None:
    """The end that explains a gang's, of those of its dead members; None while a living member may still say better."""
    best = min(ends.values(), key=lambda end: list(BLAMED).index(end.cause), default=None)
    sure = best is not None and not BLAMED[best.cause] and best.cause != "lost"
    return best if sure or len(ends) == members else None


def stands_alone(failures: int, losses: int) -> bool:
    """Whether a subject is tried alone: it failed, or may be what causes its losses."""
    return failures > 0 or losses >= SUSPICIOUS


def verdict_on(cause: str, failures: int, losses: int, pack: int | None, packed: int, limits: Limits) -> Verdict:
    """The verdict on a subject, with its failures, losses and pack so far, after an attempt in a pack of `packed` rows.

    Memory that ran out in a pack blames the pack: half of it is tried. Alone, it is the subject's failure.
    """
    if cause == "oom" and packed > 1:
        return Verdict("waiting", failures, losses, max(1, packed // 2))
    blame = BLAMED[cause]
    failures, losses = failures + blame, losses + (not blame)
    out = failures >= limits.tries or losses >= limits.losses
    return Verdict("quarantined" if out else "waiting", failures, losses, pack)
