"""More merges for an existing BPE tokenizer, learned on new text (continued BPE, arXiv:2512.03989).

The text is split into words and encoded by the tokenizer as it is. Then, as in the training of any BPE (Sennrich et al. 2016,
arXiv:1508.07909), the most frequent pair of neighbouring tokens becomes a new token, again and again. The new merges come after
the old ones, so that text is first encoded as before, and only then are neighbours merged further.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import xxhash

from pretrain.data.cache import cache_dir, cache_file, make_private, used_now
from pretrain.runtime.errors import UserError
from pretrain.runtime.strict_json import read_json

MAX_CHARS = (
    50_000_000  # more text hardly changes the merges, and learning takes about a second for a million characters
)
Pair = tuple[str, str]
SPACE = "▁"  # starts the words of tokenizers that do not split text into words


def check_grows(state: Mapping[str, Any], *, name: str) -> None:
    """Raise ``UserError`` if merges can't be added to the tokenizer with the tokenizer.json ``state``."""
    kind = (state.get("model") or {}).get("type")
    if kind != "BPE":
        raise UserError(
            f"transform.vocabulary.size: the tokenizer of {name} is a {kind} model, to which no merges can be added; give the "
            "new tokens as a list: transform.vocabulary.tokens"
        )


def learned(tokenizer: Any, texts: Iterable[str], size: int) -> list[Pair]:
    """Return what `learn` does on the first ``MAX_CHARS`` characters of ``texts``. What was learned on the same text is in the
    token cache, so that other processes and a resumed run only read the text."""
    sample, total = [], 0
    for text in texts:
        if total >= MAX_CHARS:
            break
        total += len(text)
        sample.append(text)
    digest = xxhash.xxh3_128(f"{tokenizer.to_str()} {size}".encode())
    for text in sample:
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    file = cache_dir() / "merges" / f"{digest.hexdigest()}.json"
    try:
        found = [(str(a), str(b)) for a, b in read_json(file)]
        used_now(file)
    except (OSError, ValueError, TypeError):
        make_private(cache_dir())
        found = learn(tokenizer, sample, size)
        with cache_file(file) as opened:
            opened.write(json.dumps(found, ensure_ascii=False).encode())
    return found


def learn(tokenizer: Any, texts: Iterable[str], size: int) -> list[Pair]:
    """Return at most ``size`` new merges of ``tokenizer``, a BPE of the tokenizers library, learned on ``texts``. There are fewer
    if no pair occurs twice any more."""
    state = json.loads(tokenizer.to_str())
    words = count_words(tokenizer, texts)
    encoded = encode_words(state, [*words])
    return merges(encoded, [words[word] for word in words], size, known=state["model"]["vocab"].keys())


def count_words(tokenizer: Any, texts: Iterable[str]) -> Counter[str]:
    """Return how often each word occurs in ``texts``, as the tokenizer's normalizer and pre-tokenizer write it."""
    words: Counter[str] = Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
        if tokenizer.pre_tokenizer is None:
            words.update(SPACE * bool(i) + part for i, part in enumerate(normal.split(SPACE)) if part)
        else:
            words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    return words


def encode_words(state: dict[str, Any], words: Sequence[str]) -> list[list[str]]:
    """Return the tokens of each word under the BPE of a tokenizer.json alone, without normalizer and pre-tokenizer."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(
        json.dumps(
            state
            | {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
            | {"added_tokens": [], "truncation": None, "padding": None}
        )
    )
    return [encoding.tokens for encoding in bare.encode_batch(list(words), add_special_tokens=False)]


def merges(words: list[list[str]], counts: Sequence[int], size: int, *, known: Iterable[str]) -> list[Pair]:
    """Return the ``size`` pairs that are merged one after the other in ``words``, lists of tokens that occur ``counts`` times. Of
    pairs with equal counts the alphabetically first is merged. Pairs whose merge is among the ``known`` tokens, or that
    occur once, are not."""
    taken = set(known)
    total: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, (word, count) in enumerate(zip(words, counts, strict=True)):
        for pair in pairwise(word):
            total[pair] += count
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in total.items()]
    heapq.heapify(heap)
    found: list[Pair] = []
    while heap and len(found) < size:
        count, pair = heapq.heappop(heap)
        if -count != total[pair]:  # an old entry: the pair has lost or won since
            if total[pair] > 1:
                heapq.heappush(heap, (-total[pair], pair))
            continue
        if -count < 2:
            break
        if "".join(pair) in taken:
            continue
        found.append(pair)
        taken.add("".join(pair))
        changed: set[Pair] = set()
        for i in places.pop(pair):
            changed |= _merge_in(words, i, counts[i], pair, total, places)
        for other in changed:
            heapq.heappush(heap, (-total[other], other))
        total[pair] = 0
    return found


def _merge_in(
    words: list[list[str]], i: int, count: int, pair: Pair, total: Counter[Pair], places: defaultdict[Pair, set[int]]
) -> set[Pair]:
    """Merge ``pair`` in word i; return the pairs that have become more frequent."""
    old, new = words[i], merged(words[i], pair)
    for gone in pairwise(old):
        total[gone] -= count
    won = set(pairwise(new))
    for come in pairwise(new):
        total[come] += count
        places[come].add(i)
    words[i] = new
    return won - set(pairwise(old))


def merged(word: Sequence[str], pair: Pair) -> list[str]:
    """Return ``word`` with every occurrence of ``pair``, from the left, as one token."""
    new: list[str] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            new.append(word[i] + word[i + 1])
            i += 2
        else:
            new.append(word[i])
            i += 1
    return new


def with_merges(state: dict[str, Any], pairs: Sequence[Pair], *, first: int) -> dict[str, Any]:
    """Return a tokenizer.json with ``pairs`` merged after all others; their tokens have the ids from ``first`` on."""
    model = state["model"]
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    new = [f"{a} {b}" if as_text else [a, b] for a, b in pairs]
    vocabulary = model["vocab"] | {a + b: first + i for i, (a, b) in enumerate(pairs)}
    return state | {"model": model | {"vocab": vocabulary, "merges": [*model["merges"], *new]}}
