"""What `engine.deterministic` switches: the same bits from the same run, on one kind of GPU and one PyTorch."""

import os

import torch

from dbtrain.settings.config import EngineConfig


def choose_algorithms(settings: EngineConfig) -> None:
    """Let PyTorch use only algorithms whose results do not depend on the run, where `engine.deterministic` asks for it.

    Backward of FlashAttention and of cuDNN's convolutions otherwise adds partial sums by atomics, in whatever order the
    programs end. An operator that has no such algorithm raises RuntimeError. Call this before anything ran on the GPU.
    """
    if not settings.deterministic:
        return
    # cuBLAS reads this when it is first used, and PyTorch refuses matrix products without it. 8 buffers of 4 MiB.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # Else each torch.empty is filled with NaN, a kernel each, which helps only to find memory that is read unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False
