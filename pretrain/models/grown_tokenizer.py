"""A model's tokenizer with more tokens, and how many tokens it needs for text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.models.continued_bpe import check_grows, learned, with_merges
from pretrain.models.tokenizer import FolderTokenizer
from pretrain.models.transforms.vocabulary import NEW_TOKENS, listed
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.strict_json import read_json

TOKENIZER = "tokenizer.json"
STALE = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
)  # without the new tokens
Pieces = dict[int, tuple[int, ...]]  # id of a new token → ids of the old tokens that stand for it


def grown(
    tokenizer: Any,
    *,
    size: int | None,
    tokens: Sequence[str] | None,
    texts: Callable[[], Iterator[str]] | None,
    name: str,
) -> tuple[FolderTokenizer, Pieces]:
    """Return ``tokenizer`` with ``size`` tokens learned on ``texts``, or with the given ``tokens``, and the old pieces of each.

    Raises ``UserError`` for a tokenizer that can't grow, and for a token that it has.
    """
    from tokenizers import AddedToken, Tokenizer

    old = tokenizer.backend_tokenizer
    state = json.loads(old.to_str())
    first = max(tokenizer.get_vocab().values()) + 1
    if size is not None:
        assert texts is not None
        check_grows(state, name=name)
        pairs = learned(old, texts(), size)
        if len(pairs) < size:
            notice(f"transform.vocabulary.size={size}: the text yields only {len(pairs)} new tokens")
        backend = Tokenizer.from_str(json.dumps(with_merges(state, pairs, first=first)))
        names = [a + b for a, b in pairs]
        pieces = _old_pieces(pairs, state["model"]["vocab"], first)
    else:
        names = list(tokens or ())
        if known := [token for token in names if token in tokenizer.get_vocab()]:
            raise UserError(f"transform.vocabulary.tokens: the tokenizer of {name} has {known[0]!r} already")
        backend = Tokenizer.from_str(old.to_str())
        backend.add_tokens([AddedToken(token, normalized=False) for token in names])
        pieces = {first + i: _pieces(old, token, name) for i, token in enumerate(names)}
    if not pieces:
        raise UserError("transform.vocabulary: no new token was found in the training documents")
    content = json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=2).encode()
    files = {k: v for k, v in getattr(tokenizer, "files", {}).items() if k not in STALE}
    files |= {TOKENIZER: content, NEW_TOKENS: listed(pieces, names)}
    return _with(tokenizer, backend, files), pieces


def _with(tokenizer: Any, backend: Any, files: dict[str, bytes]) -> FolderTokenizer:
    """Return a tokenizer like ``tokenizer`` of which ``backend`` and ``files`` are."""
    from pretrain.models.tokenizer import SPECIAL, adds_bos

    named = {key: getattr(tokenizer, key) for key in SPECIAL if getattr(tokenizer, key, None) is not None}
    template = getattr(tokenizer, "chat_template", None)
    return FolderTokenizer(backend, files, **named, add_bos_token=adds_bos(tokenizer), chat_template=template)


def _old_pieces(pairs: Sequence[tuple[str, str]], vocabulary: dict[str, int], first: int) -> Pieces:
    """Return the old tokens that the token of each of ``pairs`` consists of; a pair may have tokens of earlier pairs."""
    found: dict[str, tuple[int, ...]] = {}
    for a, b in pairs:
        found[a + b] = tuple(i for part in (a, b) for i in (found.get(part) or (vocabulary[part],)))
    return {first + i: found[a + b] for i, (a, b) in enumerate(pairs)}


def _pieces(old: Any, token: str, name: str) -> tuple[int, ...]:
    ids = tuple(old.encode(token, add_special_tokens=False).ids)
    if not ids:
        raise UserError(f"transform.vocabulary.tokens: the tokenizer of {name} has no pieces for {token!r}")
    return ids


def new_tokens(file: Path) -> list[int]:
    """Return the ids of the new tokens of a checkpoint's tokenizer. Raises ``UserError`` where they are not recorded."""
    try:
        ids = read_json(file)["ids"]
        assert isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids)  # noqa: PT018
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{file}: does not list the new tokens of the vocabulary: {error}") from None
    return ids


def fertility(texts: Iterable[str], old: Any, new: Any) -> str:
    """Return how many tokens ``texts`` have for each word and each byte under two tokenizers, as text."""
    texts = list(texts)
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    if not words:
        return "no text"
    counts = [
        sum(len(e.ids) for e in one.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        for one in (old, new)
    ]
    word, byte = ([count / total for count in counts] for total in (words, size))
    fewer = 1 - counts[1] / counts[0]
    return f"{word[0]:.2f} → {word[1]:.2f} tokens a word, {byte[0]:.3f} → {byte[1]:.3f} a byte ({fewer:.1%} fewer)"
