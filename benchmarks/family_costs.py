"""What each family costs: a table of exact counts from the meta device, beside published numbers. No GPU is used.

    python benchmarks/family_costs.py [--out benchmarks/results/family-costs_cpu_202611] [--only sd15,x4_upscaler]

Every architecture of every family's row is counted, plainly and with recomputed blocks, with the layers that the
family's shipped recipe adapts, at the published size of its images. Milliseconds are modelled for an H200.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dbtrain.bench import commit  # noqa: E402
from dbtrain.bench.cards import CARDS  # noqa: E402
from dbtrain.bench.roofline import GIB, architectures, count, modelled, targets_of  # noqa: E402
from dbtrain.errors import ConfigError  # noqa: E402

PUBLISHED = {
    "sd15": "0.86B", "sdxl": "2.6B", "sd35_medium": "2.5B", "sd35_large": "8.1B", "flux1": "12B",
    "flux2_klein_4b": "4B", "flux2_klein_9b": "9B", "flux2_dev": "32B", "zimage": "6B", "qwen_image": "20B",
    "krea2": "12B", "chroma": "8.9B", "lumina2": "2.6B", "sana_1600m": "1.6B", "ideogram4": "9B", "if_i_xl": "4.3B",
    "if_ii_l": "1.2B",
}  # fmt: skip
"""Parameters of the denoiser, as its authors or a trainer's documents say."""


class Stated(NamedTuple):
    """What a trainer's documents say of a LoRA's memory, and with what settings. For the count beside it: samples of a
    step, bytes of a frozen weight (`wide`), rank, and whether blocks are recomputed (`again`); where the documents are
    silent, ours."""

    model: str
    memory: str
    settings: str
    source: str
    samples: int = 1
    wide: float = 2
    rank: int = 16
    again: bool = True


DIFFUSERS, KOHYA, OSTRIS = "huggingface/diffusers", "kohya-ss/sd-scripts", "ostris/ai-toolkit"
SIMPLE, GUIDES = "bghira/SimpleTuner", "documentation/quickstart"
STATED = (
    Stated("sd15", "fits 11 GB", "fp16, VAE and text encoder resident, no recomputation",
           f"{DIFFUSERS}, docs/source/en/training/lora.md", rank=4, again=False),
    Stated("sdxl", "less than 16 GB", "fp16, xformers, 8-bit Adam", f"{DIFFUSERS}, examples/dreambooth/README_sdxl.md",
           rank=4),
    Stated("sdxl", "fits 8 GB, 10 recommended", "caches, 8-bit optimizer or Adafactor, rank 4 to 8 on 8 GB",
           f"{KOHYA}, docs/train_SDXL-en.md", rank=8),
    Stated("sd35_large", "fits 24 GB", "base in 8 bits, 8-bit AdamW, EMA",
           f"{OSTRIS}, config/examples/train_lora_sd35_large_24gb.yaml", wide=1),
    Stated("flux1", "more than 30 GB", "bf16, every component of the blocks", f"{SIMPLE}, {GUIDES}/FLUX.md"),
    Stated("flux1", "more than 18 GB", "base in int8, every component of the blocks", f"{SIMPLE}, {GUIDES}/FLUX.md",
           wide=1),
    Stated("flux1", "more than 9 GB", "base in NF4, every component of the blocks", f"{SIMPLE}, {GUIDES}/FLUX.md",
           wide=0.5),
    Stated("flux1", "fits 24 GB", "base in 8 bits, 8-bit AdamW, EMA, 512 to 1024 px",
           f"{OSTRIS}, config/examples/train_lora_flux_24gb.yaml", wide=1),
    Stated("flux1", "fits 24 GB", "`--fp8_base`, batch of 2", f"{KOHYA}, docs/flux_train_network.md", samples=2,
           wide=1),
    Stated("flux2_klein_4b", "fits 24 GB", "ai-toolkit, an RTX 4090",
           "huggingface.co/blog/black-forest-labs/flux-2-klein-lora"),
    Stated("zimage", "32 to 40 GB", "base not quantized, every component", f"{SIMPLE}, {GUIDES}/ZIMAGE.md"),
    Stated("zimage", "16 to 24 GB", "base in int8, every component", f"{SIMPLE}, {GUIDES}/ZIMAGE.md", wide=1),
    Stated("zimage", "10 to 12 GB", "base in NF4, every component", f"{SIMPLE}, {GUIDES}/ZIMAGE.md", wide=0.5),
    Stated("qwen_image", "42 GB", "bf16, xformers", "kohya-ss/musubi-tuner, docs/qwen_image.md"),
    Stated("qwen_image", "30 GB", "base in fp8", "kohya-ss/musubi-tuner, docs/qwen_image.md", wide=1),
    Stated("krea2", "33.28 GiB, measured, H100", "bf16, fused q, k and v; rank 64 in its example",
           f"{SIMPLE}, {GUIDES}/KREA2.md", rank=64),
    Stated("krea2", "48.35 GiB, measured, H100", "the same, batch of 4",
           f"{SIMPLE}, {GUIDES}/KREA2.md", samples=4, rank=64),
    Stated("krea2", "20.35 GiB, measured, H100", "base in int8; rank 64 in its example",
           f"{SIMPLE}, {GUIDES}/KREA2.md", wide=1, rank=64),
    Stated("chroma", "about 28 GB", "base not quantized", f"{SIMPLE}, {GUIDES}/CHROMA.md"),
    Stated("chroma", "about 16 GB", "base in int8", f"{SIMPLE}, {GUIDES}/CHROMA.md", wide=1),
    Stated("chroma", "about 8 GB", "base in NF4", f"{SIMPLE}, {GUIDES}/CHROMA.md", wide=0.5),
    Stated("lumina2", "12 to 14 GB", "rank 16", f"{SIMPLE}, {GUIDES}/LUMINA2.md"),
    Stated("lumina2", "20 GB or more", "bf16, text encoder in 8 bits, 8-bit AdamW, EMA, 512 to 1024 px",
           f"{OSTRIS}, config/examples/train_lora_lumina.yaml"),
    Stated("ideogram4", "fits 80 GB", "bf16 or fp8", f"{SIMPLE}, {GUIDES}/IDEOGRAM4.md"),
    Stated("if_i_xl", "about 28 GB", "batch of 4, captions encoded before; no recomputation, no mixed precision",
           f"{DIFFUSERS}, docs/source/en/training/dreambooth.mdx (commit e343443565)", 4, 4, 4, again=False),
)  # fmt: skip


def beside(row: dict[str, Any], told: Stated) -> float:
    """GiB that we count for such settings: the base at its width, the adapter's state at its rank, and the kept
    activations of its samples. All weights count as quantized; targets are those of our recipe."""
    state = 18 * row["trained"] * told.rank / 16
    kept = row["kept_recomputed_gib" if told.again else "kept_gib"] * told.samples * max(told.wide / 2, 1)
    return (row["params"] * told.wide + state) / GIB + kept


def about(name: str) -> dict[str, Any]:
    """What a row says of an architecture before anything is counted."""
    family, shape = architectures()[name]
    return {"model": name, "family": family.name, "pixels": shape.latent_side * family.codec.cell,
            "published_params": PUBLISHED.get(name, "")}  # fmt: skip


def rows_of(name: str) -> dict[str, Any]:
    """A row of counts, plain and with recomputed blocks; or the reason why there is none."""
    family, shape = architectures()[name]
    try:
        plain, less = (count(name, family, shape, 1, targets_of(family), again) for again in (False, True))
    except ConfigError as error:
        return {**about(name), "error": str(error)}
    card = CARDS["H200"]
    fits = {key: [name for name, peaks in CARDS.items() if modelled(made, peaks)["fits"]]
            for key, made in (("fits", plain), ("fits_recomputed", less))}  # fmt: skip
    return {
        **about(name), "commit": commit(), "params": plain.params, "layers": plain.layers, "trained": plain.trained,
        "kernels": modelled(plain, card)["kernels"], "forward_tflop": plain.forward / 1e12,
        "kept_gib": plain.kept / 2 / GIB, "kept_recomputed_gib": less.kept / 2 / GIB,
        "memory_gib": plain.memory_gib(card), "memory_recomputed_gib": less.memory_gib(card),
        "modelled_ms": modelled(plain, card)["modelled_ms"], **fits,
    }  # fmt: skip


def kept_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The counts of an earlier result, by architecture, each with the commit that it was made at."""
    earlier = json.loads(path.read_text("utf-8"))
    return {row["model"]: {"commit": earlier["commit"], **row, **about(row["model"])} for row in earlier["rows"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ("model", "px", "parameters", "published", "adapted", "kernels a step", "TFLOP forward",
             "kept, GiB a sample", "memory of a LoRA step, GiB", "H200, ms (modelled)")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        if "error" in row:
            cells = (row["model"], row["pixels"], "", row["published_params"], row["error"], *[""] * 5)
            lines.append(f"| {' | '.join(map(str, cells))} |")
            continue
        lines.append(
            f"| {row['model']} | {row['pixels']} | {row['params'] / 1e9:.2f}B | {row['published_params']} "
            f"| {row['layers']} layers, {row['trained'] / 1e6:.1f}M | {row['kernels']:,} | {row['forward_tflop']:.2f} "
            f"| {row['kept_gib']:.2f}; {row['kept_recomputed_gib']:.2f} recomputed "
            f"| {row['memory_gib']:.1f}; {row['memory_recomputed_gib']:.1f} recomputed | {row['modelled_ms']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    parser.add_argument("--only", help="architectures to count, with commas; the rest stay as OUT.json has them")
    arguments = parser.parse_args()
    kept = kept_rows(arguments.out.with_suffix(".json")) if arguments.only else {}
    for name in (arguments.only or "").split(","):
        kept.pop(name, None)
    rows = [kept.get(name) or rows_of(name) for name in architectures()]
    print(table(rows))
    if arguments.out:
        only = f" --only {arguments.only}" if arguments.only else ""
        made = {"command": f"python benchmarks/family_costs.py --out {arguments.out}{only}", "commit": commit()}
        made |= {"torch": torch.__version__, "python": platform.python_version()}
        text = f"# What each family costs: exact counts, no GPU used\n\n{ABOUT}\n\n{table(rows)}\n\n"
        text += "Command: `{command}`. torch {torch}, Python {python}, commit {commit}".format(**made)
        older = {row["commit"] for row in kept.values()} - {made["commit"]}
        text += f"; rows kept from {', '.join(sorted(older))}: {', '.join(kept)}.\n" if older else ".\n"
        arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
        by_name = {row["model"]: row for row in rows}
        stated = [{**told._asdict(), "counted_gib": beside(by_name[told.model], told)} for told in STATED]
        record = json.dumps({**made, "rows": rows, "stated": stated}, indent=1) + "\n"
        arguments.out.with_suffix(".json").write_text(record, encoding="utf-8")


ABOUT = """A LoRA step of rank 16 on the layers of the family's shipped recipe: one photo and one prior, bf16, latents
and captions cached. Kernels, TFLOP and kept activations are counted on the meta device. Memory is the denoiser in bf16,
the adapter's state (18 bytes a parameter) and the kept activations of both samples; text encoders, VAE and what a block
needs while it runs come on top. Milliseconds are modelled (`dbtrain bench model`), not measured. What trainers state
stands beside these counts in docs/families.md."""

if __name__ == "__main__":
    main()
