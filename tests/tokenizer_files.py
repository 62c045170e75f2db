"""Small tokenizer.json files of every kind that models on the Hub have, and folders around them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken as Added
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
SPECIAL = [UNK, BOS, EOS, PAD, "<|endoftext|>"]
THREES = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"  # digits by threes, as in DeepSeek's and Llama 3's
LINES = [
    "In 1984 it cost 1234567.89, they'd say; I'LL pay 12345 on 2024-05-17.",
    "  two  spaces\tand a tab\n\n\nthen   three  ",
    "naïve café Ångström e\u0301 ﬁ ½ Straße 漢字 🙂",
    "def f(x):\n    return x**2  # <html> &amp;\r\n",
]


def texts() -> list[str]:
    return [*list(topics.values())[:20], *LINES, *(f"{n} {n * 7919}" for n in range(300))]


def _trained(model: Any, trainer: Any, *, vocab_size: int = 500, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(
        texts(), trainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False, **EXTRA.get(trainer, {}))
    )
    return tokenizer


EXTRA: dict[Any, dict[str, Any]] = {
    trainers.BpeTrainer: {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()},
    trainers.UnigramTrainer: {"unk_token": UNK},
}


def byte_level() -> Tokenizer:
    first = pre_tokenizers.Split(Regex(THREES), "isolated")
    split = pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return _trained(models.BPE(), trainers.BpeTrainer, pre_tokenizer=split, decoder=decoders.ByteLevel())


def metaspace() -> Tokenizer:
    """As sentencepiece's BPE with byte_fallback is written: Llama 2, Mistral, Gemma."""
    parts = {"normalizer": normalizers.Replace(" ", "▁")}
    tokenizer = _trained(models.BPE(unk_token=UNK), trainers.BpeTrainer, **parts)
    whole = json.loads(tokenizer.to_str())
    for byte in range(256):
        whole["model"]["vocab"][f"<0x{byte:02X}>"] = len(whole["model"]["vocab"])
    whole["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    parts = {"normalizer": normalizers.NFKC(), "pre_tokenizer": space, "decoder": decoders.Metaspace()}
    return _trained(models.Unigram(), trainers.UnigramTrainer, **parts)


def word_piece() -> Tokenizer:
    parts = {
        "normalizer": normalizers.BertNormalizer(lowercase=False),
        "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
    }
    return _trained(models.WordPiece(unk_token=UNK), trainers.WordPieceTrainer, decoder=decoders.WordPiece(), **parts)


def word_level() -> Tokenizer:
    return _trained(
        models.WordLevel(unk_token=UNK), trainers.WordLevelTrainer, pre_tokenizer=pre_tokenizers.Whitespace()
    )


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram, "word_piece": word_piece}
KINDS |= {"word_level": word_level}


@cache
def made(kind: str) -> str:
    """The tokenizer.json of one of ``KINDS``."""
    return str(KINDS[kind]().to_str())


def bos_and_eos(tokenizer: Tokenizer) -> None:
    """A post-processor that puts both around a text."""
    pairs = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=pairs)


def bos_only(tokenizer: Tokenizer) -> None:
    pair = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[pair])


def truncates(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(4)


def pads(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=64, pad_token=PAD, pad_id=tokenizer.token_to_id(PAD), direction="left")


def adds_tokens(tokenizer: Tokenizer) -> None:
    """Not special, with spaces taken along and before normalisation; and special ones."""
    tokenizer.add_tokens([Added("return", lstrip=True), Added("café", normalized=True), Added("  ", rstrip=True)])
    tokenizer.add_special_tokens([Added("<|im_start|>"), Added("<|im_end|>")])


CHANGES = {change.__name__: change for change in (bos_and_eos, bos_only, truncates, pads, adds_tokens)}


def folder(
    path: Path, kind: str, *changes: str, model_type: str = "llama", config: dict[str, Any] | None = None, **named: Any
) -> Path:
    """A model folder without weights: config.json, tokenizer.json and tokenizer_config.json with ``named`` in it."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(made(kind))
    for change in changes:
        CHANGES[change](tokenizer)
    tokenizer.save(str(path / "tokenizer.json"), pretty=True)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 2000} | ids | (config or {})))
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    (path / "tokenizer_config.json").write_text(json.dumps(special | named, indent=1))
    return path
