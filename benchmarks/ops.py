"""Time, bandwidth and memory of every operation beside its plain PyTorch form and a copy measured in the same run.

    python benchmarks/ops.py [--json FILE]

Quantiles are of single calls, timed by device events with a cold cache (`triton.testing.do_bench`). Without a CUDA
device it prints only what can be counted exactly: the bytes that the kernel must move, and its launches.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dbtrain_kernels import OPS  # noqa: E402
from dbtrain_kernels.dispatch import choose  # noqa: E402

PACKS = {"SD1.5 512px, 1+1": (2, 4, 64, 64), "SD1.5 512px, 16 subjects": (32, 4, 64, 64), "SDXL, 1+1": (2, 4, 128, 128)}
ROWS = {"SD1.5 LoRA r16, 1": (1, 3_190_000), "SD1.5 LoRA r16, 16": (16, 3_190_000)}
LAUNCHES = {"loss": 4, "noising": 1, "adamw": 3}
"""Kernels that the fused forms start. loss: two, and two in backward for the factor that comes from above."""


def loss_inputs(shape: tuple[int, ...], device: str) -> tuple[dict[str, Any], int]:
    """Arguments with a bf16 prediction, and the bytes of reading f, x, eps, writing the gradient, and scaling it."""
    samples, elements = shape[0], torch.Size(shape).numel()
    inputs = {name: torch.randn(shape, device=device) for name in ("prediction", "clean", "noise")}
    inputs["prediction"] = inputs["prediction"].bfloat16().requires_grad_()
    inputs |= {name: torch.rand(samples, device=device) for name in ("alpha_B", "sigma_B", "weight_B")}
    return inputs | {"parameterization": "v_prediction"}, elements * (2 + 4 + 4 + 2 + 2 + 4 + 4 + 2)


def noising_inputs(shape: tuple[int, ...], device: str) -> tuple[dict[str, Any], int]:
    """Arguments, and the bytes of reading two moments and writing x, eps and x_t in fp32."""
    samples, channels, *sides = shape
    numbers = {name: torch.arange(samples, device=device) for name in ("slot_B", "step_B")}
    inputs = {
        "moments": torch.randn((samples, 2 * channels, *sides), device=device),
        "key_B2": torch.randint(0, 2**32, (samples, 2), device=device),
        **numbers,
        "alpha_B": torch.rand(samples, device=device),
        "sigma_B": torch.rand(samples, device=device),
        "purposes": (3, 1, 4),
    }
    return inputs, torch.Size(shape).numel() * (2 + 3) * 4


def adamw_inputs(shape: tuple[int, ...], device: str) -> tuple[dict[str, Any], int]:
    """Arguments, and the bytes of reading g twice (norm, update), reading and writing p, m, v in fp32."""
    inputs = {name: torch.rand(shape, device=device) for name in ("master", "grad", "exp_avg", "exp_avg_sq")}
    inputs["step_N"] = torch.zeros(shape[0], dtype=torch.long, device=device)
    inputs |= {name: torch.full((shape[0],), 1e-3, device=device) for name in ("lr_N", "clip_N", "decay_N")}
    inputs["active_N"] = torch.ones(shape[0], dtype=torch.bool, device=device)
    return inputs, torch.Size(shape).numel() * (2 + 2 * 3) * 4


WORK = {"loss": (loss_inputs, PACKS), "noising": (noising_inputs, PACKS), "adamw": (adamw_inputs, ROWS)}


def call(function: Callable, inputs: dict[str, Any]) -> Callable[[], None]:
    """One forward call, and the backward where an argument takes a gradient."""

    def run() -> None:
        result = function(**inputs)
        if "prediction" in inputs:
            inputs["prediction"].grad = None
            result.total.backward()

    return run


def count_operators(run: Callable[[], None]) -> int:
    """ATen calls of one run that compute or copy (views launch nothing), backward included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            views = any(output.alias_info and not output.alias_info.is_write for output in func._schema.returns)
            self.calls += not views and func.__name__.split(".")[0] not in ("empty", "empty_like", "detach")
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        run()
    return counter.calls


def counts() -> list[dict[str, Any]]:
    """A row for each operation and shape: bytes, and launches of both forms. Exact on any machine."""
    rows = []
    for name, (make, shapes) in WORK.items():
        small = {key: (side[0], *(min(n, 8) for n in side[1:])) for key, side in shapes.items()}
        for label in shapes:
            inputs, _ = make(small[label], "cpu")
            plain = count_operators(call(OPS[name].load("reference"), inputs))
            moved = make(shapes[label], "meta")[1]
            rows.append({"op": name, "shape": label, "bytes": moved, "fused": LAUNCHES[name], "plain": plain})
    return rows


def timings(copy_bytes_per_s: float) -> list[dict[str, Any]]:
    """A row for each operation, shape and form: ms quantiles, share of the copy's bandwidth, peak MiB."""
    from triton.testing import do_bench

    rows = []
    for name, (make, shapes) in WORK.items():
        for label, shape in shapes.items():
            for form in ("reference", "fused"):
                inputs, moved = make(shape, "cuda")
                run = call(OPS[name].load(form), inputs)
                run()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                run()
                peak_mib = (torch.cuda.max_memory_allocated() - held) / 2**20
                low, median, high = do_bench(run, quantiles=[0.1, 0.5, 0.9])
                share = moved / (median * 1e-3) / copy_bytes_per_s
                rows.append(
                    {"op": name, "shape": label, "form": form, "ms": [low, median, high], "copy_share": share}
                    | {"peak_mib": peak_mib}
                )
    return rows


def copy_ceiling() -> float:
    """Bytes per second, read and written, of copying 1 GiB on the device."""
    from triton.testing import do_bench

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), quantiles=[0.5]) * 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here as well")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"torch": torch.__version__, "counts": counts()}
    print(f"{'op':8} {'shape':26} {'MB moved':>9} {'launches':>9} {'plain ops':>9}")
    for row in result["counts"]:
        print(f"{row['op']:8} {row['shape']:26} {row['bytes'] / 1e6:9.2f} {row['fused']:9} {row['plain']:9}")
    if torch.cuda.is_available():
        result |= {"device": torch.cuda.get_device_name(), "copy_bytes_per_s": copy_ceiling()}
        result |= {"choices": {name: choose(name, "cuda")._asdict() for name in OPS}}
        result["timings"] = timings(result["copy_bytes_per_s"])
        print(f"\n{result['device']}: a copy moves {result['copy_bytes_per_s'] / 1e9:.0f} GB/s")
        print(f"{'op':8} {'shape':26} {'form':10} {'ms (10, 50, 90%)':>24} {'of copy':>8} {'peak MiB':>9}")
        for row in result["timings"]:
            spread = " ".join(f"{value:7.4f}" for value in row["ms"])
            print(f"{row['op']:8} {row['shape']:26} {row['form']:10} {spread:>24}"
                  f" {row['copy_share']:8.1%} {row['peak_mib']:9.1f}")  # fmt: skip
    else:
        print("\nNo CUDA device: times, bandwidth and memory need one, and are not given.")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
