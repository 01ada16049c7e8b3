"""The configuration of a small CLIP text encoder."""


def text_config(tokenizer, projection: int | None = None, width: int = 32) -> dict:
    """The tokenizer's own special tokens: CLIP's pooled embedding is taken at the end-of-text token."""
    return {
        "vocab_size": 8192,
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **({"projection_dim": projection} if projection else {}),
    }
