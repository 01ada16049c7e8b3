"""Counts of what a piece of code asks of the device: launches, casts, and waits; exact, and on any machine."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbtrain_kernels import of_operators

NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view"}
"""Operators that only make or rename memory."""

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
        self.kernels = of_operators("launches")
        self.launches, self.fused, self.casts = 0, 0, 0
        self.waits: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        result = func(*args, **kwargs)
        if self._computes(func, name) and self._is_there((args, kwargs, result)):
            self.names[name] += 1
            kernels = self.kernels[name](*args) if func.namespace == "dbtrain" else 0
            self.fused += kernels
            self.launches += kernels or 1
            self.saw(func, name, args, kwargs, result, kernels or 1)
            self.casts += name == "_to_copy" and result.dtype != args[0].dtype
        if name in WAITS or _crosses(name, args, kwargs) or _finds_places(name, args):
            self.waits[name] += 1
        return result

    def saw(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, kernels: int) -> None:
        """Called with each operator that computes or copies, and the kernels that it starts; more counts go here."""

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
