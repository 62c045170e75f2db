"""What can be known of model and text before anything is trained, and warnings in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.telemetry.baseline import doubt

MANY_TOKENS = 1.5  # tokens for each byte of new text compared with old text, from which the tokenizer fits badly
MANY_EPOCHS = 4  # Muennighoff et al., arXiv:2305.16264
OVERTRAINED = (
    1000  # tokens for each parameter; Springer et al., arXiv:2503.19206, saw more forgetting beyond some hundreds
)
CARD_TOKENS = re.compile(
    r"\b(\d+(?:,\d{3})+|\d+(?:[.,]\d+)?)\s*(T|B|trillion|billion)\b[\w\s-]{0,20}\btokens", re.IGNORECASE
)
UNITS = {"t": 1e12, "trillion": 1e12, "b": 1e9, "billion": 1e9}


@dataclass(frozen=True)
class DomainLook:
    """One domain as the base model sees it.

    Attributes:
        role: new or base.
        loss: Loss in nats per token.
        bits_per_byte: The same in bits for each byte of text; ``None`` where the bytes are unknown.
        tokens: Tokens that were scored.
        tokens_per_byte: Tokens of the tokenizer for each byte; ``None`` where the bytes are unknown.
        tokens_per_word: Tokens for each word between spaces.
    """

    role: str
    loss: float
    bits_per_byte: float | None
    tokens: int
    tokens_per_byte: float | None
    tokens_per_word: float | None


@dataclass(frozen=True)
class Look:
    """Model and text before the run.

    Attributes:
        domains: The domains by name.
        uniform_loss: Loss of a uniform guess over the vocabulary.
        parameters: Parameters of the model.
        card_tokens: Tokens the base was trained on by its model card; ``None`` where it does not say.
        new_tokens: Training tokens of the new text.
        epochs: Passes over the new text in the planned run.
        common: Documents of the new text that the old text also has; ``None`` where they were not compared.
        near: Near duplicates; ``None`` where they were not compared.
    """

    domains: dict[str, DomainLook]
    uniform_loss: float | None
    parameters: int
    card_tokens: float | None
    new_tokens: int
    epochs: float
    common: int | None = None
    near: int | None = None
    warnings: list[str] = field(default_factory=list)


def warnings_of(look: Look) -> list[str]:
    """Return the warnings, each a sentence."""
    return [*_of_text(look), *_of_model(look)]


def _of_text(look: Look) -> Iterator[str]:
    new, base = (_mean(look.domains, role) for role in ("new", "base"))
    text = doubt({name: domain.loss for name, domain in look.domains.items()}, look.uniform_loss)
    if text:
        yield f"{text[0].upper()}{text[1:]}."
    if new["tokens_per_byte"] and base["tokens_per_byte"]:
        ratio = new["tokens_per_byte"] / base["tokens_per_byte"]
        if ratio > MANY_TOKENS:
            yield (
                f"The tokenizer does not fit the new text: it needs {ratio:.1f} times as many tokens for each byte as on the old "
                "text; transform=[vocabulary] adds tokens."
            )
    if new["bits_per_byte"] and base["bits_per_byte"] and new["bits_per_byte"] <= base["bits_per_byte"]:
        yield (
            f"The model knows text like the new one already: {new['bits_per_byte']:.3f} bits per byte on it, "
            f"{base['bits_per_byte']:.3f} on the old text; there may be little to learn."
        )
    if look.epochs > MANY_EPOCHS:
        yield (
            f"The planned run reads the new text {look.epochs:.1f} times; text that is repeated more than {MANY_EPOCHS} times "
            "teaches less each time (arXiv:2305.16264)."
        )
    if look.common:
        yield f"{look.common:,} documents of the new text are also in the old text."
    if look.near:
        yield f"{look.near:,} documents of the new text are near duplicates of documents of the old text."


def _of_model(look: Look) -> Iterator[str]:
    if look.card_tokens and look.card_tokens / look.parameters > OVERTRAINED:
        yield (
            f"By its model card the base was trained on {look.card_tokens / look.parameters:,.0f} tokens for each parameter; "
            "such models forget more (arXiv:2503.19206): prefer a small learning rate."
        )


def _mean(domains: Mapping[str, DomainLook], role: str) -> dict[str, float | None]:
    """Return the means over the domains of a role; ``None`` where one of them is unknown."""
    found: dict[str, float | None] = {}
    for key in ("bits_per_byte", "tokens_per_byte"):
        values = [getattr(domain, key) for domain in domains.values() if domain.role == role]
        found[key] = sum(values) / len(values) if values and None not in values else None
    return found


def card_tokens(folder: Path) -> float | None:
    """Return the tokens a base model was trained on, as its README.md says; ``None`` where it does not say."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:200_000]
    except OSError:
        return None
    found = CARD_TOKENS.search(text)
    return float(_plain(found[1])) * UNITS[found[2].lower()] if found else None


def _plain(number: str) -> str:
    """Return a number without thousands separators and with a decimal point."""
    return number.replace(",", "" if re.fullmatch(r"\d{1,3}(,\d{3})+", number) else ".")
