"""Look at the model and the text of a planned run (`task=advise`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pretrain.advise.look import DomainLook, Look, card_tokens, warnings_of
from pretrain.run.advise_scores import Scores
from pretrain.run.prepare import Prepared

COMPARED_DOCUMENTS = 2_000_000  # documents up to which new and old text are compared


def look_at(prepared: Prepared, base: Mapping[str, Scores], *, parameters: int, epochs: float, scored: int) -> Look:
    """Return what is known before anything is trained.

    Args:
        prepared: The planned run.
        base: The scores of the base model.
        parameters: Its parameters.
        epochs: How often the run reads the new text.
        scored: Tokens of each domain that were scored.
    """
    views = {name: view for name, _, view in prepared.domains}
    domains = {}
    for name, scores in base.items():
        view = views[name].limited(scored)
        text = prepared.tokenizer.decode(view.read(0, view.num_tokens).tolist(), skip_special_tokens=True)
        size, words = len(text.encode()), len(text.split())
        per_byte, per_word = (view.num_tokens / count if count else None for count in (size, words))
        domains[name] = DomainLook(scores.role, scores.loss, scores.bits_per_byte, scores.tokens, per_byte, per_word)
    look = Look(
        domains,
        prepared.model.uniform_loss(),
        parameters,
        card_tokens(Path(prepared.model.folder())),
        sum(part.view.num_tokens for part in prepared.train.parts if not part.replay),
        epochs,
        *_common_documents(prepared),
    )
    return replace(look, warnings=warnings_of(look))


def _common_documents(prepared: Prepared) -> tuple[int | None, int | None]:
    """Return how many documents of the new text the held-out old text has too, and how many of them are near duplicates; ``None``
    where they were not compared."""
    import numpy as np

    from pretrain.data.store.near_duplicates import nearly_common

    parts = [part for part in prepared.train.parts if not part.replay]
    news, olds = [part.view for part in parts], [view for _, role, view in prepared.domains if role == "base"]
    if not olds or sum(view.num_documents for view in (*news, *olds)) > COMPARED_DOCUMENTS:
        return None, None
    new, old = (np.concatenate([h for view in views for h in view.hashes()]) for views in (news, olds))
    common = len(np.intersect1d(new, old))
    replayed = [part for part in prepared.train.parts if part.replay]
    if not replayed or not all(part.near for part in (*parts, *replayed)):
        return common, None
    return common, sum(nearly_common(old.view, new) for old in replayed for new in news)
