"""What exists before the first process trains: the model's folder looked at, its tokenizer, and all text as tokens.

`instantiate` makes every part of a run from its node of the resolved config, here and in `build.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

import xxhash
from hydra.utils import instantiate as hydra_instantiate

from pretrain.errors import UserError
from pretrain.split import Split

if TYPE_CHECKING:
    from pretrain.data.sources.base import Source
    from pretrain.data.store import TokenStore, TokenView
    from pretrain.remains import Remains


def instantiate(node: dict[str, Any]) -> Any:
    """The object that ``node`` stands for. A key that is a word of Python (``async``) gets the underscore it has there."""
    return hydra_instantiate({f"{k}_" if iskeyword(k) else k: v for k, v in node.items()}, _convert_="all")


def model_spec(resolved: dict[str, Any]) -> Any:
    """The model that the config names; a run's or a checkpoint's weights where it names one of these.

    Raises ``UserError`` for a checkpoint that is not whole.
    """
    from pretrain.checkpoint.weights import weights_folder

    spec, verify = instantiate(resolved["model"]), instantiate(resolved["checkpoint"]).verify
    folder = weights_folder(spec.name_or_path, key="model_name", verify=verify)
    tokenizer = spec.tokenizer_name and weights_folder(spec.tokenizer_name, key="model.tokenizer_name", verify=verify)
    return replace(spec, name_or_path=folder, tokenizer_name=tokenizer)


def _checked_model(resolved: dict[str, Any]) -> tuple[Any, Remains | None]:
    """The model that the config names, checked; where it is gone, that of the checkpoint from which the run continues.

    Raises ``UserError`` where neither can be used.
    """
    from pretrain.remains import remains_of

    length = resolved["sequence_length"]
    try:
        model = model_spec(resolved)
        model.check(length)
        return model, None
    except UserError:
        found = remains_of(resolved)
        if found is None:
            raise
    model = found.in_place_of(instantiate(resolved["model"]))
    model.check(length)
    return model, found


@dataclass(frozen=True)
class Prepared:
    """What exists before the first process trains. ``domains``: name, role and held-out documents of each domain.
    ``global_batch``: sequences of all devices and micro-batches in one step. ``base_gone``: what to say of a run whose base
    model is no longer there."""

    model: Any
    tokenizer: Any
    train: TokenView
    domains: list[tuple[str, str, TokenView]]
    identity: dict[str, Any]
    global_batch: int
    base_gone: str | None = None


def prepare(resolved: dict[str, Any], *, devices: int = 1) -> Prepared:
    """Check the model's folder, get its tokenizer, and tokenize whatever the cache does not hold yet. ``devices``: of
    all processes, each with ``batch_size`` sequences at a time.

    Raises ``UserError`` for a model or data that can't be used.
    """
    from pretrain.data.tokenize import prepare as tokenize
    from pretrain.data.tokenize import training_texts

    model, gone = _checked_model(resolved)
    source = instantiate(resolved["dataset"])
    tokenizer = model.tokenizer(partial(training_texts, source))
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_name={resolved['model_name']}: its tokenizer has no end-of-text token (eos_token)")
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    encode = partial(tokenize, tokenizer_json=tokenizer_json, eot=tokenizer.eos_token_id)

    store = encode(source)
    train, held_out = views(store, source)
    domains = [(source.domain, "new", held_out)] if held_out.num_tokens > 1 else []
    for base in instantiate(resolved["evaluation"]).domains.values():
        if base.domain != source.domain:
            domains.append((base.domain, "base", views(encode(base), base)[1]))
    global_batch = Split.asked(resolved).total * devices
    identity = {
        "model": gone.identity if gone else model.identity(),
        "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer_json.encode()),
        "data": xxhash.xxh3_64_hexdigest(
            repr([[part.path.name for part in store.parts], view_options(source), source.document_mask]).encode()
        ),
        "sequence_length": resolved["sequence_length"],
        "global_batch": global_batch,
        "seed": resolved["seed"],
        "weights": instantiate(resolved["precision"]).weights,
        "optimizer": [resolved["optimizer"].get(key) for key in ("_target_", "compensate")],
    }
    return Prepared(model, tokenizer, train, domains, identity, global_batch, base_gone=gone.notice if gone else None)


def view_options(source: Source) -> dict[str, Any]:
    return {
        "held_out": source.held_out,
        "train_data_ratio": source.train_data_ratio,
        "deduplicate": source.deduplicate,
    }


def views(store: TokenStore, source: Source) -> tuple[TokenView, TokenView]:
    """The training and the held-out documents."""
    return store.views(**view_options(source))


def total_steps(resolved: dict[str, Any], prepared: Prepared) -> int:
    """``max_steps``, or as many whole global batches as ``number_epochs`` passes over the training tokens hold.

    Raises ``UserError`` when the text does not fill one global batch.
    """
    from pretrain.data.loader import check_enough

    sequences = (prepared.train.num_tokens - 1) // resolved["sequence_length"]
    check_enough(prepared.train, sequence_length=resolved["sequence_length"], global_batch=prepared.global_batch)
    return resolved["max_steps"] or max(1, int(sequences * resolved["number_epochs"] / prepared.global_batch))
