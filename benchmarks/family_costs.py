"""What each family costs: a table of exact counts from the meta device, beside published numbers. No GPU is used.

    python benchmarks/family_costs.py [--out benchmarks/results/family-costs_cpu_202611]

Every architecture of every family's row is counted, plainly and with recomputed blocks, with the layers that the
family's shipped recipe adapts, at the published size of its images. Milliseconds are modelled for an H200.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dbtrain.bench import commit  # noqa: E402
from dbtrain.bench.cards import CARDS  # noqa: E402
from dbtrain.bench.roofline import GIB, architectures, count, modelled, targets_of  # noqa: E402
from dbtrain.errors import ConfigError  # noqa: E402

PUBLISHED = {
    "sd15": ("0.86B", "11 GB, LoRA (diffusers, training/lora.md)"),
    "sdxl": ("2.6B", ""),
    "sd35_medium": ("2.5B", ""), "sd35_large": ("8.1B", ""),
    "flux1": ("12B", "24 GB, base in int8, blocks recomputed (ai-toolkit)"),
    "flux2_klein_4b": ("4B", ""), "flux2_klein_9b": ("9B", ""), "flux2_dev": ("32B", ""),
    "zimage": ("6B", ""), "qwen_image": ("20B", "42 GB in bf16, 30 GB in fp8 (musubi-tuner, docs/qwen_image.md)"),
    "krea2": ("12B", ""), "lumina2": ("2.6B", ""), "sana_1600m": ("1.6B", ""),
    "if_i": ("4.3B", "28 GB, LoRA (diffusers, dreambooth/README.md)"),
}  # fmt: skip
"""Parameters of the denoiser and memory of a LoRA's training as the authors or a trainer's documents say."""


def rows_of(name: str) -> dict[str, Any]:
    """A row of counts, plain and with recomputed blocks; or the reason why there is none."""
    family, shape = architectures()[name]
    about = {"model": name, "family": family.name, "pixels": shape.latent_side * family.codec.cell}
    about |= dict(zip(("published_params", "published_memory"), PUBLISHED.get(name, ("", ""))))
    try:
        plain, less = (count(name, family, shape, 1, targets_of(family), again) for again in (False, True))
    except ConfigError as error:
        return {**about, "error": str(error)}
    card = CARDS["H200"]
    fits = {key: [name for name, peaks in CARDS.items() if modelled(made, peaks)["fits"]]
            for key, made in (("fits", plain), ("fits_recomputed", less))}  # fmt: skip
    return {
        **about, "params": plain.params, "layers": plain.layers, "trained": plain.trained,
        "kernels": modelled(plain, card)["kernels"], "forward_tflop": plain.forward / 1e12,
        "kept_gib": plain.kept / 2 / GIB, "kept_recomputed_gib": less.kept / 2 / GIB,
        "memory_gib": plain.memory_gib(card), "memory_recomputed_gib": less.memory_gib(card),
        "modelled_ms": modelled(plain, card)["modelled_ms"], **fits,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ("model", "px", "parameters", "published", "adapted", "kernels a step", "TFLOP forward",
             "kept, GiB a sample", "memory of a LoRA step, GiB", "published memory", "H200, ms (modelled)")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        if "error" in row:
            cells = (row["model"], row["pixels"], "", row["published_params"], row["error"], *[""] * 6)
            lines.append(f"| {' | '.join(map(str, cells))} |")
            continue
        lines.append(
            f"| {row['model']} | {row['pixels']} | {row['params'] / 1e9:.2f}B | {row['published_params']} "
            f"| {row['layers']} layers, {row['trained'] / 1e6:.1f}M | {row['kernels']:,} | {row['forward_tflop']:.2f} "
            f"| {row['kept_gib']:.2f}; {row['kept_recomputed_gib']:.2f} recomputed "
            f"| {row['memory_gib']:.1f}; {row['memory_recomputed_gib']:.1f} recomputed | {row['published_memory']} "
            f"| {row['modelled_ms']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    arguments = parser.parse_args()
    rows = [rows_of(name) for name in architectures()]
    print(table(rows))
    if arguments.out:
        made = {"command": f"python benchmarks/family_costs.py --out {arguments.out}", "commit": commit()}
        made |= {"torch": torch.__version__, "python": platform.python_version()}
        text = f"# What each family costs: exact counts, no GPU used\n\n{ABOUT}\n\n{table(rows)}\n\n"
        text += "Command: `{command}`. torch {torch}, Python {python}, commit {commit}.\n".format(**made)
        arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
        record = json.dumps({**made, "rows": rows}, indent=1) + "\n"
        arguments.out.with_suffix(".json").write_text(record, encoding="utf-8")


ABOUT = """A LoRA step of rank 16 on the layers of the family's shipped recipe: one photo and one prior, bf16, latents
and captions cached. Kernels, TFLOP and kept activations are counted on the meta device. Memory is the denoiser in bf16,
the adapter's state (18 bytes a parameter) and the kept activations of both samples; text encoders, VAE and what a block
needs while it runs come on top. Milliseconds are modelled (`dbtrain bench model`), not measured."""

if __name__ == "__main__":
    main()
