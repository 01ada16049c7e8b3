"""Counts of what a piece of code asks of the device: launches, casts, and waits; exact, and on any machine."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbtrain_kernels.lora import SPLIT

NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view"}
"""Operators that only make or rename memory."""


def _copies(*tensors: torch.Tensor | None, dtype: torch.dtype | None = None) -> int:
    """How many of a fused operation's arguments are copied first: cast to a dtype, or made contiguous."""
    given = [tensor for tensor in tensors if tensor is not None]
    return sum(tensor.dtype != (dtype or tensor.dtype) or not tensor.is_contiguous() for tensor in given)


def _noising(moments: torch.Tensor, key: torch.Tensor, slot: torch.Tensor, step: torch.Tensor, *others: Any) -> int:
    tables, chosen = others[:2], others[6:9]
    return 1 + _copies(*tables, dtype=torch.float32) + _copies(moments, key, slot, step, *chosen)


def _lora(x: torch.Tensor, base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: torch.Tensor) -> int:
    return 2 + _copies(x, base, down[0], up[0]) + _copies(scale, dtype=torch.float32)


def _lora_backward(grad: torch.Tensor, small: torch.Tensor, x: torch.Tensor, *rest: torch.Tensor) -> int:
    *matrices, scale = rest
    parts = 4 if small.shape[1] <= SPLIT else 6  # the parts of many tokens are added up, for both matrices
    return parts + _copies(grad, small, x, *(one[0] for one in matrices)) + _copies(scale, dtype=torch.float32)


LAUNCHES: dict[str, Callable[..., int]] = {
    "loss": lambda *args: 2 + _copies(*args[:3], args[7]) + _copies(*args[3:6], args[9], dtype=torch.float32),
    "noising": _noising,
    "adamw": lambda *_: 3,
    "lora": _lora,
    "lora_backward": _lora_backward,
}
"""Kernels that a fused operation starts for its arguments, copies of arguments included."""

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
"""Operators whose result the host must see before it can go on."""


class Operators(TorchDispatchMode):
    """Counts, inside the block, backward included; of one kind of device, or of all.

    launches: operators that compute or copy; a fused one counts as the kernels it starts, whose sum is `fused`. casts:
    those of them that only change a dtype. waits: names of operators for which the host would wait on a GPU. names: how
    often each ran.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.launches, self.fused, self.casts = 0, 0, 0
        self.waits: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        result = func(*args, **kwargs)
        if self._computes(func, name) and self._is_there((args, kwargs, result)):
            self.names[name] += 1
            kernels = LAUNCHES[name](*args) if func.namespace == "dbtrain" else 0
            self.fused += kernels
            self.launches += kernels or 1
            self.casts += name == "_to_copy" and result.dtype != args[0].dtype
        if name in WAITS or _crosses(name, args, kwargs) or _finds_places(name, args):
            self.waits[name] += 1
        return result

    def _is_there(self, values: Any) -> bool:
        """Whether a tensor of the call lies on the device that is looked at."""
        tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
        return self.device_type is None or any(tensor.device.type == self.device_type for tensor in tensors)

    @staticmethod
    def _computes(func: Any, name: str) -> bool:
        view = any(output.alias_info and not output.alias_info.is_write for output in func._schema.returns)
        return not view and name not in NOTHING


def _crosses(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a copy goes to the host, or from it so that the host waits for all that was launched before."""
    if name == "copy_":
        target, source, unwaited = args[0].device.type, args[1].device.type, len(args) > 2 and args[2]
    elif name == "_to_copy":
        target, source = torch.device(kwargs.get("device") or args[0].device).type, args[0].device.type
        unwaited = kwargs.get("non_blocking", False)
    else:
        return False
    return source != target and (target == "cpu" or not unwaited)


def _finds_places(name: str, args: Any) -> bool:
    """Whether an index is a mask, whose places the host must count."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
