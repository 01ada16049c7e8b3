"""The DeepSpeed engine: ZeRO 0-3, one process or many. The only door to deepspeed.

Parameters that train are fp32 and are their own masters; bf16 and fp16 compute come from autocast, so one meaning of
precision holds at every stage. The base weights that do not train are stored in the compute precision. In fp16 the loss
is scaled, and hooks unscale each gradient as it leaves autocast's casts, so that DeepSpeed sees none of it.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dbtrain.engines.adamw8 import MOMENTS, AdamW8
from dbtrain.engines.deepspeed_json import deepspeed_config
from dbtrain.engines.engine import BatchPlan, EngineState, ParamGroup
from dbtrain.engines.loss_scale import KIND, LossScales
from dbtrain.engines.world import BACKENDS, World
from dbtrain.errors import ConfigError, EngineError
from dbtrain.settings.config import RunConfig
from dbtrain.values import Parts

LINEAR = nn.functional.linear  # ZeRO stage 3 puts another in its place, which rounds otherwise, and leaves it there


def zero_keys() -> set[str]:
    """The keys that this DeepSpeed knows under `zero_optimization`."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = DeepSpeedZeroConfig.model_fields
    return set(known) | {field.alias for field in known.values() if field.alias}


def _accepted_config(config: RunConfig, plan: BatchPlan, on_gpu: bool = False) -> dict:
    """The DeepSpeed configuration of a run; ConfigError if DeepSpeed itself refuses a value in a user's file."""
    from deepspeed.runtime.config import DeepSpeedConfig

    merged = deepspeed_config(config, plan, zero_keys(), on_gpu)
    if config.engine.deepspeed is not None:
        try:
            DeepSpeedConfig(copy.deepcopy(merged))
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise ConfigError(f"{config.engine.deepspeed}: DeepSpeed refuses it: {said}; correct that value") from error
    return merged


def join_deepspeed(world: World) -> None:
    """Let DeepSpeed use the process group that `start_world` made."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", world.device.partition(":")[2] or "0")
    if world.device == "cpu":
        # DeepSpeed would compile a CPU all-reduce used only for inference (42 s, needs g++); its own table switches it
        # off. With a GPU there is none, and to look at the table would print what cannot be built to stdout.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=BACKENDS[torch.device(world.device).type], verbose=False)


@torch.no_grad()
def load_in_parts(parts: Parts, config: RunConfig, plan: BatchPlan, world: World) -> nn.Module:
    """A module in fp32 whose parameters are shared by the ranks as ZeRO stage 3 shares them, filled tensor by tensor
    from the first rank's disk: no rank ever holds more than its part and one tensor. All ranks call this together."""
    import deepspeed

    join_deepspeed(world)
    settings = _accepted_config(config, plan, world.device != "cpu")
    with deepspeed.zero.Init(config_dict_or_path=settings):  # told fp32, 0.19 makes bf16 on a CPU
        module = parts.make()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    if strange := sorted({*parts.names} ^ {*parameters, *({*parts.names} & {*buffers})}):
        raise ConfigError(f"model.path: {strange[0]} is in the denoiser or in its files, and not in both")
    for name in parts.names:
        if name in buffers:
            buffers[name].copy_(parts.tensor(name))
            continue
        with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
            if world.first:
                parameters[name].copy_(parts.tensor(name))
    return module


class ZeroEngine:
    """A module under DeepSpeed with AdamW; see `engine.Engine`."""

    def __init__(self, module: nn.Module, groups: list[ParamGroup], config: RunConfig, plan: BatchPlan, world: World):
        import deepspeed

        join_deepspeed(world)
        self.world, self.config, self.plan, self.groups = world, config, plan, groups
        self.names = {name: param for group in groups for name, param in group.params.items()}
        train = config.train
        on_gpu = world.device != "cpu" and not config.engine.zero.offload_optimizer
        trained = [{"params": list(group.params.values()), "lr": group.lr} for group in groups]
        numbers: dict[str, Any] = {
            "betas": (train.beta1, train.beta2), "eps": train.eps, "weight_decay": train.weight_decay
        }  # fmt: skip
        optimizer: AdamW8 | torch.optim.AdamW
        if train.optimizer == "adamw8bit":
            optimizer = AdamW8(trained, **numbers)
        else:
            optimizer = torch.optim.AdamW(trained, **numbers, fused=on_gpu)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_accepted_config(config, plan, world.device != "cpu")
        )
        self.adamw = optimizer
        self.scales = LossScales(1) if train.precision == "fp16" else None
        if self.scales is not None:
            for param in self.names.values():
                param.register_hook(self._unscaled)
            optimizer.register_step_pre_hook(self._pass_over)
        self._start_moments()

    def __call__(self, *inputs):
        """The wrapped module's output (ZeRO-3 gathers parameters as it runs)."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the global loss; DeepSpeed averages over ranks, so undo that."""
        scale = 1.0 if self.scales is None else float(self.scales.scale_N)
        self.deepspeed.backward(loss * (self.world.size * scale), scale_wrt_gas=False)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()

    def step(self, scale: float) -> float:
        """Clip and update with `scale` times the peak learning rates; the gradient norm before clipping.

        A norm that is not finite is NaN, infinite or -1; one that a DeepSpeed JSON switched off is 0, and so is that of
        a step that was left out because its gradient overflowed in fp16.
        """
        for settings, group in zip(self.deepspeed.optimizer.param_groups, self.groups):
            settings["lr"] = group.lr * scale
        # DeepSpeed gives no norm at stage 0, and frees the gradients in its step.
        norm = nn.utils.get_total_norm(self._gradients()) if self._stage == 0 else None
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        if self.scales is not None and norm is not None and self._left_out(float(norm)):
            return 0.0
        self._update_ema()
        return 0.0 if norm is None else float(norm)

    def _gradients(self) -> list[Tensor]:
        """The gradients that there are: nothing of a loss depends on the last block's text in Qwen-Image."""
        return [param.grad for param in self.names.values() if param.grad is not None]

    def _unscaled(self, grad: Tensor) -> Tensor:
        """A parameter's gradient without the loss scale, which is a power of two."""
        return grad if self.scales is None else grad / float(self.scales.scale_N)

    def _pass_over(self, *_: object) -> None:
        """Hide gradients that are not finite from AdamW, which passes over a parameter without one. At stage 0 alone:
        at the others DeepSpeed (0.19) leaves such a step out itself."""
        grads = self._gradients() if self._stage == 0 else []
        if grads and not torch.isfinite(nn.utils.get_total_norm(grads)):
            for param in self.names.values():
                param.grad = None

    def _left_out(self, norm: float) -> bool:
        """Whether a step in fp16 was left out, as its gradient overflowed; the scale has followed."""
        assert self.scales is not None
        finite = 0 <= norm < math.inf
        left = finite or self._stage == 0 or bool(getattr(self.deepspeed.optimizer, "overflow", False))
        return bool(self.scales.update(torch.tensor([finite]), torch.tensor([True]))) and left

    def state(self, row: int = 0) -> EngineState:
        """Masters, Adam moments and EMA, whole, in fp32 on the CPU of the first rank. The one subject is row 0."""
        gathered: EngineState = {kind: {} for kind in self.kinds}
        for kind in self.kinds:
            with self._in_full(kind):
                for name, param in self.names.items():
                    value = self._read(param, kind)
                    if self.world.first:
                        gathered[kind][name] = value.detach().float().cpu().reshape(self._shape(param)).clone()
        return gathered if self.scales is None else {**gathered, KIND: self.scales.state()}

    def load(self, state: EngineState, step: int) -> None:
        """Put back a state taken after `step` steps, from any world size or stage."""
        missing = self.names.keys() ^ state["master"].keys()
        if missing:
            raise EngineError(
                f"checkpoint and model differ in trained parameters, such as {sorted(missing)[0]}; "
                "was train.method, lora.targets or lora.rank changed?"
            )
        scaling = state.get(KIND)
        for kind in [kind for kind in self.kinds if kind in state]:
            with self._in_full(kind):
                for name, param in self.names.items():
                    self._write(param, kind, state[kind][name].to(self.world.device))
        if self.scales is not None:
            self.scales.load(0, scaling)
            step -= int(self.scales.skipped_N)
        for partition in self._partitions():
            self.adamw.state[partition]["step"].fill_(step)
        self._publish_masters()

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks, and put back the function it replaced for the whole process."""
        self.deepspeed.destroy()
        nn.functional.linear = LINEAR

    @property
    def kinds(self) -> list[str]:
        """The kinds of state of a parameter."""
        return ["master", "exp_avg", "exp_avg_sq", *(["ema"] if self.config.train.ema else [])]

    @property
    def _stage(self) -> int:
        return self.config.engine.zero.stage

    def _partitions(self) -> Iterator[Tensor]:
        """The fp32 tensors that AdamW really updates on this rank."""
        if self._stage == 0:
            return iter(self.names.values())
        if self._stage == 3:
            return iter(self.deepspeed.optimizer.fp32_partitioned_groups_flat)
        return iter(self.deepspeed.optimizer.single_partition_of_fp32_groups)

    def _start_moments(self) -> None:
        """Create AdamW's lazy state now, so that loading and the EMA need no first step."""
        for partition in self._partitions():
            if isinstance(self.adamw, AdamW8):
                self.adamw.start(partition)
            else:
                counter = torch.zeros((), device=partition.device if self.adamw.defaults["fused"] else "cpu")
                zeros = {kind: torch.zeros_like(partition) for kind in MOMENTS}
                self.adamw.state[partition] = {"step": counter, **zeros}
            if self.config.train.ema:
                self.adamw.state[partition]["ema"] = partition.detach().clone()
        self._link_states()

    @contextmanager
    def _in_full(self, kind: str) -> Iterator[None]:
        """Within, a moment that is kept in 8 bits stands in fp32 where DeepSpeed and `torch.optim.AdamW` have it."""
        if kind not in MOMENTS or not isinstance(self.adamw, AdamW8):
            yield
            return
        for partition in self._partitions():
            self.adamw.widen(partition, kind)
        self._link_states()
        yield
        for partition in self._partitions():
            self.adamw.narrow(partition, kind)
        self._link_states()

    def _link_states(self) -> None:
        """Let DeepSpeed (0.19) find by parameter what AdamW holds by partition now; stage 3 looks it up each time."""
        if self._stage in (1, 2):
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.config.train.ema:
            for partition in self._partitions():
                self.adamw.state[partition]["ema"].lerp_(partition, 1 - self.config.train.ema)

    def _read(self, param: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            return param if kind == "master" else self.adamw.state[param][kind]
        if kind == "master":
            return safe_get_full_fp32_param(param)
        return safe_get_full_optimizer_state(param, kind)

    @torch.no_grad()
    def _write(self, param: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._stage == 0:
            (param if kind == "master" else self.adamw.state[param][kind]).copy_(value)
        elif kind == "master":
            safe_set_full_fp32_param(param, value)
        else:
            safe_set_full_optimizer_state(param, value, kind)

    @torch.no_grad()
    def _publish_masters(self) -> None:
        """Copy the masters into the parameters that the forward pass reads."""
        if self._stage in (1, 2):
            self.deepspeed.optimizer.update_lp_params()
        elif self._stage == 3:
            zero = self.deepspeed.optimizer
            for group, _ in enumerate(zero.fp16_groups):
                zero._reassign_or_swap_out_partitioned_parameters(group)

    @staticmethod
    def _shape(param: nn.Parameter) -> torch.Size:
        return getattr(param, "ds_shape", param.shape)
