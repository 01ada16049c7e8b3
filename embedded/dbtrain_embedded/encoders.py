"""The two encoders that score pictures: a CLIP-style pair and an identity ViT, and their contrastive training.

The text tower of the pair is also the text encoder of the base. It is frozen while the UNet trains, as in Stable
Diffusion.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dbtrain_embedded import pool
from dbtrain_embedded.loops import Trainer, autocast, crew_rank, device, stream_of, weights
from dbtrain_embedded.vocabulary import MAX_LENGTH, Captions

WIDTH = 128
TOWER = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
PATCHES = {"image_size": 64, "patch_size": 8}


def build_clip(tokenizer):
    """An untrained `CLIPModel`: text 2 layers, vision 4 layers, 128 wide, 8-pixel patches."""
    from transformers import CLIPConfig, CLIPModel

    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        **TOWER,
        **special,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "num_hidden_layers": 2,
        "projection_dim": WIDTH,
    }
    vision = {**TOWER, **PATCHES, "num_hidden_layers": 4, "projection_dim": WIDTH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def build_identity():
    """An untrained `ViTModel`: 4 layers, 128 wide, 8-pixel patches, no pooler. Its embedding is the [CLS] state."""
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**TOWER, **PATCHES, num_hidden_layers=4), add_pooling_layer=False)


def clip_loss(model, tokens: torch.Tensor, pixels: torch.Tensor) -> tuple:
    """(symmetric InfoNCE, share of pictures whose best caption is right) of N token rows and their N pictures.

    Several pictures of a batch can have the same caption. All of these captions count as right for each of them.
    """
    with autocast():
        output = model(input_ids=tokens, pixel_values=pixels)
    logits = model.logit_scale.exp().clamp(max=100) * output.image_embeds.float() @ output.text_embeds.float().T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    loss = -(target * F.log_softmax(logits, 1)).sum(1).mean() - (target.T * F.log_softmax(logits, 0)).sum(0).mean()
    return 0.5 * loss, (same.gather(1, logits.argmax(1, keepdim=True))).mean()


def _open_clip(work: Path, tokenizer, text_frozen: bool):
    """An untrained pair, or, with `text_frozen`, the one of stage `clip` with its text tower frozen."""
    model = build_clip(tokenizer).to(device())
    if text_frozen:
        model.load_state_dict(weights(work, "clip"))
        model.text_model.requires_grad_(False)
        model.text_projection.requires_grad_(False)
    return model


def train_clip(
    work: Path, minutes: float, tokenizer_path: str, text_frozen: bool = False, batch: int = 128, lr: float = 1.5e-3
) -> None:
    """Train the pair on the pool; checkpoint `work`/clip.pt.

    text_frozen: train only the vision tower of the trained pair, with augmentation; checkpoint `work`/vision.pt. The
    UNet can train at the same time, because the text tower does not change.
    """
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_path)
    images, facts = pool.pictures(work), pool.facts(work)
    captions = Captions(tokenizer, [f["caption"] for f in facts], [f["noun"] for f in facts])
    model = _open_clip(work, tokenizer, text_frozen)
    trainer = Trainer("vision" if text_frozen else "clip", model, work, minutes, lr, muon=True, ema=0.995)
    torch.manual_seed(1000 * trainer.step + crew_rank())
    held_images, held_captions, held_facts = pool.held_out(256)
    held_tokens = Captions(tokenizer, held_captions, [f["noun"] for f in held_facts]).rows

    def loss_of_step(step):
        rng = stream_of(6 if text_frozen else 2, step)
        rows = np.sort(rng.choice(len(images), size=batch, replace=False))
        tokens = torch.from_numpy(captions.take(rows, rng)).to(device())
        pixels = pool.to_tensor(images[rows])
        loss, hits = clip_loss(trainer.model, tokens, augment(pixels, rng) if text_frozen else pixels)
        return loss, {"hits": hits}

    def watch(average, step):
        with torch.no_grad():
            tokens = torch.from_numpy(held_tokens).to(device())
            loss, hits = clip_loss(average, tokens, pool.to_tensor(held_images))
        return {"held_loss": float(loss), "held_hits": float(hits)}

    trainer.run(loss_of_step, every=100, watch=watch)


def identity_rows(facts: list) -> dict:
    """(sprite, colour) -> pool indices of the scenes that show this individual, upright and in the photo style.

    Individuals of fewer than four scenes are left out.
    """
    rows_of: dict[tuple, list] = {}
    for index, fact in enumerate(facts):
        if fact["style"] is None and fact["view"] != "upside-down":
            rows_of.setdefault((fact["sprite"], fact["colour"]), []).append(index)
    return {individual: np.asarray(rows) for individual, rows in rows_of.items() if len(rows) >= 4}


def augment(pixels: torch.Tensor, rng) -> torch.Tensor:
    """The pictures, lightly changed: mirrored or not, shifted and zoomed up to 12%, light and contrast up to 10%."""
    count = len(pixels)
    scale = torch.from_numpy(rng.uniform(0.88, 1.12, count)).float()
    flip = torch.from_numpy(np.where(rng.random(count) < 0.5, -1.0, 1.0)).float()
    shift = torch.from_numpy(rng.uniform(-0.12, 0.12, (count, 2))).float()
    theta = torch.stack(
        [torch.stack([scale * flip, 0 * scale, shift[:, 0]], 1), torch.stack([0 * scale, scale, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast = torch.from_numpy(rng.uniform(0.9, 1.1, (count, 1, 1, 1))).float().to(pixels.device)
    brightness = torch.from_numpy(rng.uniform(-0.1, 0.1, (count, 1, 1, 1))).float().to(pixels.device)
    return moved * contrast + brightness


def identity_loss(model, first: torch.Tensor, second: torch.Tensor, temperature: float = 0.1) -> tuple:
    """(InfoNCE over individuals, accuracy). Row b of both views shows individual b; all other rows are negatives."""
    with autocast():
        states = model(pixel_values=torch.cat([first, second])).last_hidden_state[:, 0]
    a, b = F.normalize(states.float(), dim=-1).chunk(2)
    logits = a @ b.T / temperature
    target = torch.arange(len(a), device=a.device)
    loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return loss, (logits.argmax(1) == target).float().mean()


def train_identity(work: Path, minutes: float, batch: int = 96, lr: float = 1.5e-3) -> None:
    """Train the identity encoder on the pool; checkpoint `work`/identity.pt.

    Half of each batch is of two classes only, so the encoder must learn what differs inside a class.
    """
    torch.manual_seed(1)
    images, facts = pool.pictures(work), pool.facts(work)
    rows = identity_rows(facts)
    individuals = list(rows)
    nouns = np.asarray([facts[rows[individual][0]]["noun"] for individual in individuals])
    trainer = Trainer("identity", build_identity().to(device()), work, minutes, lr, muon=True, ema=0.995)
    torch.manual_seed(1000 * trainer.step + crew_rank())

    def loss_of_step(step):
        rng = stream_of(3, step)
        classmates = np.flatnonzero(np.isin(nouns, rng.choice(np.unique(nouns), 2, replace=False)))
        classmates = rng.permutation(classmates)[: batch // 2]
        others = np.setdiff1d(np.arange(len(individuals)), classmates)
        others = rng.choice(others, batch - len(classmates), replace=False)
        chosen = [individuals[index] for index in np.concatenate([classmates, others])]
        pairs = np.stack([rng.choice(rows[individual], 2, replace=False) for individual in chosen])
        first, second = (augment(pool.to_tensor(images[pairs[:, view]]), rng) for view in (0, 1))
        loss, hits = identity_loss(trainer.model, first, second)
        return loss, {"hits": hits}

    trainer.run(loss_of_step, every=100)
