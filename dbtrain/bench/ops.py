"""Every fused operation beside its plain form: exact counts anywhere, times and bandwidth and memory on a GPU.

Quantiles are of single calls with a cold cache, between device events. A call is recorded as a CUDA graph first and
replayed, else Python's own time would be measured; where that cannot be, the row says so. Beside them stand a copy and
a matrix product measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from dbtrain.bench import origin
from dbtrain.bench.operators import Operators
from dbtrain_kernels import OPS
from dbtrain_kernels.dispatch import choose

Inputs = tuple[dict[str, Any], int, int]
"""Keyword arguments, bytes that must be moved, floating-point operations of matrix products."""

Shapes = dict[str, tuple[int, ...]]
PACKS: Shapes = {"SD1.5, 1+1": (2, 4, 64, 64), "SD1.5, 16 subjects": (32, 4, 64, 64), "SDXL, 1+1": (2, 4, 128, 128)}
ROWS: Shapes = {"LoRA r16, 1": (1, 3_190_000), "LoRA r16, 16": (16, 3_190_000), "full SD1.5, bf16": (1, 859_520_964)}
LAYERS: Shapes = {
    "SD1.5 4096 tokens, 1": (1, 2 * 4096, 320),
    "SD1.5 4096 tokens, 8": (8, 2 * 4096, 320),
    "SDXL 1024 tokens, 1": (1, 2 * 1024, 1280),
}
RANK = 16


def loss_inputs(shape: tuple[int, ...], device: str) -> Inputs:
    """A bf16 prediction; bytes of reading f, x, eps, writing the gradient, and scaling it in backward."""
    samples, elements = shape[0], torch.Size(shape).numel()
    inputs: dict[str, Any] = {name: torch.randn(shape, device=device) for name in ("prediction", "clean", "noise")}
    inputs["prediction"] = inputs["prediction"].bfloat16().requires_grad_()
    inputs |= {name: torch.rand(samples, device=device) for name in ("alpha_B", "sigma_B", "weight_B")}
    return inputs | {"parameterization": "v_prediction"}, elements * (2 + 4 + 4 + 2 + 2 + 2), 0


def noising_inputs(shape: tuple[int, ...], device: str) -> Inputs:
    """t drawn too; bytes of reading two moments and writing x, eps and x_t in fp32."""
    samples, channels, *sides = shape
    inputs = {
        "moments": torch.randn((samples, 2 * channels, *sides), device=device),
        "key_B2": torch.randint(0, 2**32, (samples, 2), device=device),
        "slot_B": torch.arange(samples, device=device),
        "step_B": torch.arange(samples, device=device),
        "alpha_S": torch.rand(1000, device=device),
        "sigma_S": torch.rand(1000, device=device),
        "purposes": (3, 1, 4, 2, 9),
        "first_S": torch.arange(1000, device=device) * 2**22,
    }
    return inputs, torch.Size(shape).numel() * (2 + 3) * 4, 0


def adamw_inputs(shape: tuple[int, ...], device: str) -> Inputs:
    """Bytes of reading g twice (norm, update), reading and writing p, m, v. One row: bf16 g, and a bf16 copy."""
    rows, flat = shape[0], shape[1] > 10_000_000
    inputs = {name: torch.rand(shape, device=device) for name in ("master", "grad", "exp_avg", "exp_avg_sq")}
    if flat:
        inputs |= {"grad": inputs["grad"].bfloat16(), "compute": inputs["master"].bfloat16()}
    inputs["step_N"] = torch.zeros(rows, dtype=torch.long, device=device)
    inputs |= {name: torch.full((rows,), 1e-3, device=device) for name in ("lr_N", "clip_N", "decay_N")}
    inputs["active_N"] = torch.ones(rows, dtype=torch.bool, device=device)
    return inputs, torch.Size(shape).numel() * (2 * (2 if flat else 4) + 2 * 3 * 4 + (2 if flat else 0)), 0


def lora_inputs(shape: tuple[int, ...], device: str) -> Inputs:
    """One attention projection; bytes of x, base and output, then of dy twice, x and dx; both matrices, products."""
    subjects, tokens, width = shape
    lead = (subjects, tokens)
    inputs = {name: torch.randn(*lead, width, device=device).bfloat16().requires_grad_() for name in ("x", "base")}
    inputs["down_NRD"] = torch.randn(subjects, RANK, width, device=device).requires_grad_()
    inputs["up_NDR"] = torch.randn(subjects, width, RANK, device=device).requires_grad_()
    inputs["scale_N"] = torch.ones(subjects, device=device)
    moved = subjects * (tokens * width * 2 * 7 + 2 * RANK * width * 4 * 3)
    return inputs, moved, 12 * subjects * tokens * width * RANK


WORK: dict[str, tuple[Callable[[tuple[int, ...], str], Inputs], Shapes]] = {
    "loss": (loss_inputs, PACKS),
    "noising": (noising_inputs, PACKS),
    "adamw": (adamw_inputs, ROWS),
    "lora": (lora_inputs, LAYERS),
}
"""How to make an operation's arguments, and the shapes that it meets in training."""


def call(name: str, function: Callable, inputs: dict[str, Any]) -> Callable[[], None]:
    """One forward call, and the backward where an argument takes a gradient."""
    tracked = [inputs[key] for key in OPS[name].differentiable if inputs.get(key) is not None]

    def run() -> None:
        output = function(**inputs)
        if tracked:
            head = output.total if hasattr(output, "total") else output
            torch.autograd.grad(head, tracked, torch.ones_like(head))

    return run


def counts() -> list[dict[str, Any]]:
    """A row for each operation and shape: bytes, launches of the kernels, operators of the plain form. Exact."""
    rows = []
    for name, (make, shapes) in WORK.items():
        for label, shape in shapes.items():
            inputs, moved, _ = make(shape, "meta")
            seen = {}
            for form in ("fused", "reference"):
                with Operators("meta") as seen[form]:
                    call(name, OPS[name].load(form), inputs)()
            rows.append(
                {"op": name, "shape": label, "bytes": moved}
                | {form: operators.launches for form, operators in seen.items()}
            )
    return rows


def counts_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| op | shape | MB moved | kernels | plain operators |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['bytes'] / 1e6:,.2f} | {row['fused']} | {row['reference']} |"
        )
    return "\n".join(lines)


def quantiles_ms(run: Callable[[], None], turns: int = 40) -> list[float]:
    """10%, 50% and 90% of single calls on a GPU, in ms, each after the cache was overwritten."""
    cache = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for _ in range(5):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(turns)]
    for begin, end in events:
        cache.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    taken = statistics.quantiles((begin.elapsed_time(end) for begin, end in events), n=10, method="inclusive")
    return [taken[0], taken[4], taken[8]]


def replayed(run: Callable[[], None]) -> tuple[Callable[[], None], bool]:
    """(a replay of the call as one CUDA graph, True), or (the call as it is, False) where it cannot be recorded."""
    before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    beside = torch.cuda.Stream()
    beside.wait_stream(before)
    with torch.cuda.stream(beside):
        for _ in range(3):
            run()
    before.wait_stream(beside)
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return run, False
    finally:
        torch.cuda.set_stream(before)
    return graph.replay, True


def ceilings() -> dict[str, float]:
    """What this GPU reaches: bytes/s of copying 1 GiB (read and written), FLOP/s of a bf16 product of 8192 squares."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy_ms = quantiles_ms(lambda: target.copy_(source), 10)[1]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gemm_ms = quantiles_ms(lambda: torch.mm(a, b), 10)[1]
    return {"copy_bytes_per_s": 2 * source.nbytes / copy_ms * 1e3, "gemm_flop_per_s": 2 * 8192**3 / gemm_ms * 1e3}


def timings(top: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each operation, shape and form: ms quantiles, shares of the copy and of the product, peak MiB."""
    rows = []
    for name, (make, shapes) in WORK.items():
        for label, shape in shapes.items():
            for form in ("reference", "fused"):
                inputs, moved, flop = make(shape, "cuda")
                run = call(name, OPS[name].load(form), inputs)
                run()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                run()
                peak_mib = (torch.cuda.max_memory_allocated() - held) / 2**20
                run, graphed = replayed(run)
                spread = quantiles_ms(run)
                rate = 1e3 / spread[1]
                shares = {"copy_share": moved * rate / top["copy_bytes_per_s"]}
                shares |= {"gemm_share": flop * rate / top["gemm_flop_per_s"]}
                found = {"op": name, "shape": label, "form": form, "replayed": graphed, "ms": spread}
                rows.append({**found, **shares, "peak_mib": peak_mib})
                del inputs, run
    return rows


def measure() -> dict[str, Any]:
    """Everything that this machine can tell of the operations."""
    result: dict[str, Any] = {**origin(), "counts": counts()}
    if torch.cuda.is_available():
        result |= {"device": torch.cuda.get_device_name(), "ceilings": ceilings()}
        result["choices"] = {name: choose(name, "cuda")._asdict() for name in OPS}
        result["timings"] = timings(result["ceilings"])
    return result


def table(result: dict[str, Any]) -> str:
    """What `measure` found, for people."""
    lines = [counts_table(result["counts"]), ""]
    if "timings" not in result:
        return "\n".join([*lines, "No CUDA device: times, bandwidth and memory need one, and are not given."])
    top = result["ceilings"]
    reached = f"{top['copy_bytes_per_s'] / 1e9:,.0f} GB/s and {top['gemm_flop_per_s'] / 1e12:,.0f} TFLOP/s"
    lines += [
        f"{result['device']}: {reached} by a copy and a bf16 product\n",
        "| op | shape | form | ms (10, 50, 90%) | of copy | of product | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["timings"]:
        spread = " ".join(f"{value:.4f}" for value in row["ms"])
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['form']}{'' if row['replayed'] else ' (with Python)'} | {spread} "
            f"| {row['copy_share']:.0%} | {row['gemm_share']:.1%} | {row['peak_mib']:,.1f} |"
        )
    return "\n".join(lines)
