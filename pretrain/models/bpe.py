"""Training of a byte-level BPE tokenizer, for a model from scratch or a language that existing tokenizers split too finely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.runtime.console import notice

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MAX_CHARS = 200_000_000  # more text does not change the vocabulary any more, and training on it is slow


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> Any:
    """Train a tokenizer on ``texts`` and return it as a transformers tokenizer. It has at most ``vocab_size`` tokens, and fewer
    if the texts have fewer different pairs to merge.

    The BPE is byte-level (Radford et al. 2019), so it can encode any text. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts, MAX_CHARS), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        notice(f"model.train_tokenizer={vocab_size}: the text yields only {tokenizer.get_vocab_size()} tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _first(texts: Iterator[str], max_chars: int) -> Iterator[str]:
    """Yield from ``texts`` until ``max_chars`` characters have been yielded."""
    given = 0
    for text in texts:
        if given >= max_chars:
            return
        given += len(text)
        yield text
