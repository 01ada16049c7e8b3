"""Why attempts end, by their errors and by a gang's members, and what becomes of a subject then."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from dbtrain.errors import DataError, EngineError, StopRequested, SubjectTaken
from dbtrain.fleet.causes import BLAMED, End, end_of_gang, explain, verdict_on
from dbtrain.fleet.schedule import Limits
from dbtrain.storage.trouble import bare


def caused(error, by):
    error.__cause__ = by
    return error


@pytest.mark.parametrize("error, cause", [
    (torch.OutOfMemoryError(), "oom"),
    (MemoryError(), "oom"), (RuntimeError("CUDA out of memory. Tried"), "oom"), (OSError(28, "No space left"), "disk"),
    (DataError("bad shard"), "error"), (KeyError("x"), "error"),
    (OSError(5, "Input/output error"), "file"), (OSError(116, "Stale file handle", "a"), "disk"),
    (PermissionError(13, "Permission denied", "a"), "file"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk"),
    (caused(DataError("shard cannot be read"), OSError(5, "Input/output error")), "file"),
    (bare(caused(DataError("shard cannot be read"), OSError(116, "Stale file handle"))), "disk"),
    (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "disk"),
    (FileNotFoundError(2, "No such file or directory", "a"), "error"),
    (caused(DataError("no shard"), FileNotFoundError(2, "No such file or directory", "a")), "error"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6044."), "lost"),
    (ConnectionResetError(104, "Connection reset by peer"), "lost"),
    (StopRequested("stopped on request"), "stopped"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"), "device"),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), "device"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "device"),
    (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), "device"),
    (torch.AcceleratorError("the device went away"), "device"),
    (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5"), "lost"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
    (RuntimeError("CUDA error: out of memory"), "oom"),
    (torch.AcceleratorError("CUDA error: device-side assert triggered"), "error"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"), "error"),
    (SubjectTaken("s1 is being trained by another process"), "lost"),
    (EngineError("model.attention: flash: CUDA error"), "error"),
])  # fmt: skip
def test_causes_of_errors(error, cause):
    assert explain(error).cause == cause


LOST, KILLED = End("lost", "connection closed by peer"), End("killed", "died of SIGKILL")
DEVICE = End("device", "CUDA error: uncorrectable ECC error encountered")
BUG, CRASH = End("error", "ZeroDivisionError"), End("crash", "died of SIGABRT")


@pytest.mark.parametrize("ends, members, best", [
    ({0: BUG}, 1, BUG), ({0: LOST}, 2, None), ({0: BUG}, 2, None), ({1: KILLED}, 2, KILLED),
    ({0: LOST, 1: KILLED}, 2, KILLED), ({0: BUG, 1: KILLED}, 3, KILLED), ({0: BUG, 1: LOST}, 2, BUG),
    ({0: LOST, 1: BUG, 2: LOST}, 3, BUG), ({0: LOST, 1: CRASH}, 2, CRASH), ({0: LOST, 1: LOST}, 2, LOST), ({}, 2, None),
    ({0: LOST, 1: DEVICE}, 2, DEVICE), ({0: BUG, 1: DEVICE}, 2, DEVICE), ({0: DEVICE, 1: KILLED}, 2, KILLED),
])  # fmt: skip
def test_a_gangs_end_is_told_by_the_member_that_knows_why(ends, members, best):
    assert end_of_gang(ends, members) == best


@pytest.mark.parametrize("cause", BLAMED)
def test_only_a_subjects_own_failures_quarantine_it(cause):
    failures = losses = 0
    for number in range(1, 4):
        verdict = verdict_on(cause, failures, losses, None, 1, Limits(tries=3))
        failures, losses = verdict.failures, verdict.losses
        assert verdict.state == ("quarantined" if BLAMED[cause] and number == 3 else "waiting")
    assert (failures, losses) == ((3, 0) if BLAMED[cause] else (0, 3))
    assert verdict_on("killed", 0, 99, None, 1, Limits()).state == "quarantined"


def test_memory_that_ran_out_halves_the_pack_before_it_counts():
    packs, pack = [], 8
    while True:
        verdict = verdict_on("oom", 0, 0, pack, pack, Limits())
        packs.append(verdict.pack)
        if verdict.failures:
            break
        pack = verdict.pack
    assert packs == [4, 2, 1, 1]
