"""Every fused operation beside its plain form: exact counts anywhere, times and bandwidth and memory on a GPU.

Quantiles are of single calls with a cold cache, between device events. A call is recorded as a CUDA graph first and
replayed, else Python's own time would be measured; where that cannot be, the row says so. Beside them stand a copy and
a matrix product measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dbtrain.bench import Say, origin, to_nobody
from dbtrain.bench.flops import count_flops
from dbtrain.bench.operators import Operators
from dbtrain_kernels import OPS
from dbtrain_kernels.cases import Case
from dbtrain_kernels.dispatch import choose


def call(name: str, function: Callable, inputs: dict[str, Any]) -> Callable[[], None]:
    """One forward call, and the backward where an argument takes a gradient."""
    tracked = [inputs[key].requires_grad_() for key in OPS[name].differentiable]

    def run() -> None:
        output = function(**inputs)
        if tracked:
            heads = [one for one in (output if isinstance(output, tuple) else (output,)) if one.requires_grad]
            torch.autograd.grad(heads, tracked, [torch.ones_like(head) for head in heads])

    return run


def work() -> Iterator[tuple[str, Case]]:
    """Every operation that has a benchmark, with each call that it meets in training."""
    for name, op in OPS.items():
        if op.work:
            yield from ((name, case) for case in op.load("work")())


def counts() -> list[dict[str, Any]]:
    """A row for each operation and shape: bytes, launches of the kernels, operators of the plain form. Exact."""
    rows = []
    for name, case in work():
        seen = {}
        for form in ("fused", "reference"):
            run = call(name, OPS[name].load(form), case.inputs(device="meta"))
            with Operators("meta") as seen[form]:
                run()
        launches = {form: operators.launches for form, operators in seen.items()}
        rows.append({"op": name, "shape": case.name, "bytes": case.moved} | launches)
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


def timings(top: dict[str, float], say: Say) -> list[dict[str, Any]]:
    """A row for each operation, shape and form: ms quantiles, shares of the copy and of the product, peak MiB."""
    rows = []
    for name, case in work():
        flop = count_flops(call(name, OPS[name].load("fused"), case.inputs(device="meta")))
        for form in ("reference", "fused"):
            run = call(name, OPS[name].load(form), case.inputs(device="cuda"))
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            run()
            peak_mib = (torch.cuda.max_memory_allocated() - held) / 2**20
            run, graphed = replayed(run)
            spread = quantiles_ms(run)
            rate = 1e3 / spread[1]
            shares = {"copy_share": case.moved * rate / top["copy_bytes_per_s"]}
            shares |= {"gemm_share": flop * rate / top["gemm_flop_per_s"]}
            timing = {"op": name, "shape": case.name, "form": form, "replayed": graphed, "ms": spread}
            rows.append({**timing, **shares, "peak_mib": peak_mib})
            say(rows[-1])
            del run
    return rows


def measure(say: Say = to_nobody) -> dict[str, Any]:
    """Everything that this machine can tell of the operations. say: gets each timed row at once."""
    result: dict[str, Any] = {**origin(), "counts": counts()}
    if torch.cuda.is_available():
        result |= {"device": torch.cuda.get_device_name(), "ceilings": ceilings()}
        result["choices"] = {name: choose(name, "cuda")._asdict() for name in OPS}
        result["timings"] = timings(result["ceilings"], say)
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
