"""What one LoRA training step asks of a GPU, counted exactly on published architectures without their weights.

    python benchmarks/step_counts.py [--out benchmarks/results/step-counts_cpu_202611] [--models sd15 sdxl]

Everything runs on PyTorch's meta device: operators have shapes and no numbers, so the whole step of the real
architecture is counted on any machine. The counts are operators that compute or copy, backward, clipping and AdamW
included; a fused operation counts as the kernels that it starts. `peft` is diffusers' training script with PEFT
adapters; `plain` and `fused` are dbtrain's step with plain PyTorch operations and with its kernels.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dbtrain.bench import commit  # noqa: E402
from dbtrain.bench.gpu_forms import flash  # noqa: E402
from dbtrain.bench.operators import Operators  # noqa: E402
from dbtrain.bench.roofline import ALPHA_BAR, architectures, captions_of, meta_step  # noqa: E402
from dbtrain.engines import packed  # noqa: E402
from dbtrain.engines.unit_scale import restore_unit_divisions  # noqa: E402
from dbtrain.models import adapters  # noqa: E402
from dbtrain.training import step  # noqa: E402
from dbtrain_kernels import reference  # noqa: E402

RANK, STEPS = 16, 1000
MODELS = architectures()
TARGETS = ("attn*.to_q", "attn*.to_k", "attn*.to_v", "attn*.to_out.0")


@contextmanager
def operations(fused: bool) -> Iterator[None]:
    """The step with its kernels, or with the plain form of each."""
    places = ((adapters, "lora"), (step, "loss"), (step, "noising"), (packed, "adamw"))
    kept = [(place, name, getattr(place, name)) for place, name in places]
    if not fused:
        for place, name in places:
            setattr(place, name, getattr(reference, name))
    try:
        yield
    finally:
        for place, name, function in kept:
            setattr(place, name, function)


def our_step(name: str, subjects: int) -> Callable[[], None]:
    """One step of a pack of so many subjects, layer by layer; benchmarks/fused_projections.py counts the other way."""
    made = meta_step(*MODELS[name], subjects, TARGETS, RANK, fused=False, pointwise=False)
    return lambda: made.backward(made.forward())


def peft_step(name: str) -> Callable[[], None]:
    """One step as diffusers' train_dreambooth_lora.py writes it, its latents and captions cached too."""
    from peft import LoraConfig

    unet = MODELS[name][1].blank("meta")
    restore_unit_divisions(unet)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    trained = [param for param in unet.parameters() if param.requires_grad]
    for param in trained:  # what the script's cast_training_params does
        param.data = param.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
    alpha_bar_S, side = ALPHA_BAR.float().to("meta"), MODELS[name][1].latent_side
    moments = torch.empty(2, 8, side, side, device="meta", dtype=torch.bfloat16)
    captions = captions_of(MODELS[name][1], 2, torch.bfloat16)
    added = {"text_embeds": captions.pooled_BD, "time_ids": torch.empty(2, 6, device="meta", dtype=torch.bfloat16)}

    def run() -> None:
        mean, logvar = moments.chunk(2, 1)
        latents = (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)) * 0.18215
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, STEPS, (2,), device="meta")
        alpha_bar = alpha_bar_S.to(latents.dtype)[timesteps]
        alpha, sigma = (level.flatten()[:, None, None, None] for level in (alpha_bar**0.5, (1 - alpha_bar) ** 0.5))
        noisy = alpha * latents + sigma * noise
        prediction = unet(noisy, timesteps, captions.states_BTD, added_cond_kwargs=added, return_dict=False)[0]
        (ours, prior), (target, prior_target) = prediction.chunk(2), noise.chunk(2)
        loss = F.mse_loss(ours.float(), target.float()) + 1.0 * F.mse_loss(prior.float(), prior_target.float())
        loss.backward()
        # clip_grad_norm_, whose form over lists refuses the meta device.
        grads = [param.grad for param in trained]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        optimizer.step()
        optimizer.zero_grad()

    return run


def counted(run: Callable[[], None]) -> dict[str, Any]:
    """Counts of a step after a first one, which makes the optimizer's state."""
    with flash():
        run()
        with Operators("meta") as seen:
            run()
    return {"launches": seen.launches, "casts": seen.casts, "most": dict(seen.names.most_common(6))}


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """A row of counts for each way to make a step, and for the packs."""
    about = {"model": name, "layers": len(adapters.matching_layers(MODELS[name][1].blank("meta"), TARGETS))}
    yield {**about, "form": "peft", "subjects": 1, **counted(peft_step(name))}
    for form, subjects in (("plain", 1), ("fused", 1), ("fused", 8)):
        with operations(form == "fused"):
            yield {**about, "form": form, "subjects": subjects, **counted(our_step(name, subjects))}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | adapted layers | form | subjects | launches | of them casts | a subject |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = row["launches"] / row["subjects"]
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['form']} | {row['subjects']} | {row['launches']:,} "
            f"| {row['casts']:,} | {own:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json as well")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["sd15", "sdxl"])
    arguments = parser.parse_args()
    from dbtrain.bench.ops import counts, counts_table

    rows = [row for name in arguments.models for row in rows_of(name)]
    moved = counts()
    print(table(rows), "\n", counts_table(moved), sep="\n")
    if arguments.out:
        made = {"command": f"python benchmarks/step_counts.py --out {arguments.out}", "commit": commit()}
        made |= {"torch": torch.__version__, "python": platform.python_version()}
        record = {**made, "steps": rows, "operations": moved}
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(report(made, rows, moved), encoding="utf-8")


def report(made: dict[str, str], rows: list[dict[str, Any]], moved: list[dict[str, Any]]) -> str:
    """The result file for people."""
    from dbtrain.bench.ops import counts_table

    return f"""# What a LoRA step asks of a GPU: exact counts, no GPU used

Rank {RANK} on every attention projection, one photo and one prior a step, bf16 compute, latents and captions cached.
Counted on the meta device; an operator that computes or copies is one launch, a fused operation as many as it starts.
A lower bound for what a GPU launches: some operators (AdamW over lists of tensors, convolutions, norms' backward)
start several kernels. `peft` is diffusers' train_dreambooth_lora.py; `plain` and `fused` are a dbtrain pack.

{table(rows)}

## Operations alone

MB that each must move, kernels that it starts, and operators of its plain form.

{counts_table(moved)}

Command: `{made["command"]}`. torch {made["torch"]}, Python {made["python"]}, commit {made["commit"]}.
"""


if __name__ == "__main__":
    main()
