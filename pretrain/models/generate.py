"""Generation of continuations, greedily or by sampling, without changing the random state of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pretrain.models.hub.export import end_ids
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.tokenizer import Boundaries


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: Any,
    prompts: list[str],
    *,
    boundaries: Boundaries,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[str]:
    """Return the continuation of each prompt, without the prompt, up to a token that ends a text or, in a chat model, a turn.

    A prompt is the start of a document, so it begins with the BOS of ``boundaries`` if there is one.
    ``temperature=0`` decodes greedily. Prompt number n is sampled with the seed ``seed`` + n, so a sample does not depend on
    the prompts before it. A continuation ends at the latest at the model's last position.

    Raises ``UserError`` for a prompt that takes all positions of the model.
    """
    hf, training, positions = model.hf, model.training, model.num_positions
    device = next(hf.parameters()).device
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    model.eval()
    ends = _ends(hf, tokenizer, boundaries)
    texts = []
    try:
        for number, prompt in enumerate(prompts):
            tokens = _prompt_tokens(prompt, tokenizer, boundaries, positions)
            ids = torch.tensor([tokens], device=device)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed + number)
                out = hf.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(max_new_tokens, positions - len(tokens)),
                    eos_token_id=ends,
                    pad_token_id=boundaries.separator,
                    use_cache=True,
                    **sampling,
                )
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    finally:
        model.train(training)
    return texts


def _prompt_tokens(prompt: str, tokenizer: Any, boundaries: Boundaries, positions: int) -> list[int]:
    """Return the tokens of a prompt with its BOS. Raise ``UserError`` for one that takes all ``positions`` of the model."""
    bos = [] if boundaries.bos is None else [boundaries.bos]
    # With an empty prompt the model starts a new document.
    tokens = [*bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] or [boundaries.separator]
    if len(tokens) >= positions:
        raise UserError(f"a prompt of {len(tokens)} tokens is too long: the model has {positions} positions")
    return tokens


def _ends(hf: Any, tokenizer: Any, boundaries: Boundaries) -> list[int]:
    """Return the token ids at which generation stops: those of the generation config, the tokenizer's eos_token and the
    separator of documents."""
    named = (*end_ids(hf.generation_config), tokenizer.eos_token_id, boundaries.separator)
    return sorted({token for token in named if token is not None})
