"""The unedited inputs: a tiny model, a tokenizer, a few documents."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

WORDS = (
    "the sea road of stone a ship and its crew went under light rain to see old cities far from home again café".split()
)
VOCABULARY = 300
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
SHAPES["llama-tied"] = SHAPES["llama"] | {"tie_word_embeddings": True}
SMALL = [
    "sequence_length=16",
    "batch_size=2",
    "evaluation=new_only",
    "evaluation.max_tokens=200",
    "evaluation.samples=0",
]


def sentences(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=draw.randint(4, 12))).capitalize() + "." for _ in range(count))


def documents(count: int = 12) -> list[str]:
    """Some lines and paragraphs, quotes, letters of several bytes."""
    found = [sentences(i, 3 + i % 3) for i in range(count)]
    found[1] = 'She said: "go, then", and went.\nA second line, with a comma.\n\nA paragraph.'
    found[2] = "Ünïcödé, 書き, emoji 🙂, tab\there, back\\slash, {braces} [brackets]"
    return found


def make_model(folder: Path, shape: str = "llama", *, shards: bool = False) -> None:
    """A model folder as save_pretrained writes it; ``shards``: of several weight files and an index."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pretrain.models.bpe import train_bpe

    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[shape], vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    model.generation_config.save_pretrained(folder)
    train_bpe(iter([*documents(), *(sentences(i, 100) for i in range(4))]), vocab_size=VOCABULARY).save_pretrained(
        folder
    )


def write_texts(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:02}.txt").write_text(text)
