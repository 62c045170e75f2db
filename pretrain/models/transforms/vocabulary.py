"""A larger vocabulary: new tokens in the tokenizer, and rows for them in embedding and head."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from pretrain.models.transforms.base import ModelTransform, thaw_at, train_from_row
from pretrain.models.transforms.derived import Read, Rows, derive
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Start = Literal["mean", "distribution", "random"]
Texts = Callable[[], Iterator[str]]
NEW_TOKENS = "new_tokens.json"  # beside the tokenizer's files: which tokens are new
CHUNK = 4096  # rows that are read at a time for the mean of all


@dataclass(frozen=True)
class Vocabulary(ModelTransform):
    """Add tokens to the model's tokenizer, and rows for them to embedding and head. The text is tokenized with them; compare
    bits per byte with the model before, not the perplexity of other tokens.

    Attributes:
        size: Number of tokens to learn on the training documents, as merges of the model's BPE (arXiv:2512.03989).
        tokens: Instead of size: the new tokens themselves, e.g. [Kubernetes, kubectl].
        start: Values of the new rows: mean (of the old pieces of the token) · distribution (drawn as the old rows are
            distributed) · random.
        only_new_rows: true: train only the rows of the new tokens.
        thaw_at: With only_new_rows: share of the run after which everything is trained; null: never.
        multiple_of: The number of rows is padded to a multiple of this.
    """

    size: PositiveInt | None = None
    tokens: list[str] | None = None
    start: Start = "mean"
    only_new_rows: bool = False
    thaw_at: Annotated[float, Field(gt=0, lt=1)] | None = None
    multiple_of: PositiveInt = 64

    def check(self) -> None:
        if (self.size is None) == (not self.tokens):
            raise UserError(
                "transform.vocabulary: set one of size, the number of new tokens, and tokens, a list of them"
            )
        if self.thaw_at is not None and not self.only_new_rows:
            raise UserError("transform.vocabulary.thaw_at: only with only_new_rows=true")
        tokens = self.tokens or []
        wrong = [token for token in tokens if not token.strip() or tokens.count(token) > 1]
        if wrong:
            raise UserError(f"transform.vocabulary.tokens: {wrong[0]!r} is empty or given twice")

    def prepare(
        self, tokenizer: Any, folder: Path, texts: Texts | None, *, in_checkpoint: bool
    ) -> tuple[Any, GrowRows]:
        from pretrain.models.grown_tokenizer import grown, new_tokens

        if not in_checkpoint:
            if self.size is not None and texts is None:
                raise UserError(
                    "transform.vocabulary.size: only pretraining and tokenization have documents to learn it on"
                )
            tokenizer, pieces = grown(tokenizer, size=self.size, tokens=self.tokens, texts=texts, name=str(folder))
        else:
            pieces = dict.fromkeys(new_tokens(folder / NEW_TOKENS), ())
        return tokenizer, GrowRows(self, pieces, total=max(tokenizer.get_vocab().values()) + 1)

    def apply(self, model: Any) -> None:
        """Add a row for each new token without a tokenizer, as a plan of memory does; a run applies what `prepare` returns."""
        new = self.size if self.tokens is None else len(self.tokens)
        GrowRows(self, {}, total=len(model.get_input_embeddings().weight) + (new or 0)).apply(model)


@dataclass(frozen=True)
class GrowRows(ModelTransform):
    """Add rows to embedding and head.

    Attributes:
        settings: The settings of the transform.
        pieces: Ids of the new tokens → ids of the old tokens that stood for them; empty for a model that has the rows.
        total: Number of tokens of the tokenizer.
    """

    settings: Vocabulary
    pieces: dict[int, tuple[int, ...]]
    total: int
    grows_vocabulary = True

    def apply(self, model: Any) -> None:
        import torch

        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        before, step = len(embedding.weight), self.settings.multiple_of
        rows = max(before, -(-self.total // step) * step)
        first = min(self.pieces, default=before)
        if any(self.pieces.values()) or rows > before:
            seed = int(torch.randint(2**62, ()))
            std = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)
            for module, attribute in self._places(embedding, head):
                old: Any = getattr(module, attribute)
                new = derive(old, self._rows(old, seed=seed, std=std), (rows, *old.shape[1:]))
                for part in (embedding, head):
                    if getattr(part, attribute, None) is old:
                        setattr(part, attribute, new)
                new.requires_grad_(old.requires_grad)
            embedding.num_embeddings = rows
            if hasattr(head, "out_features"):
                head.out_features = rows
            set_rows(model, before, rows)
        if self.settings.only_new_rows:
            self._train_new_rows(model, self._places(embedding, head), first)

    def _train_new_rows(self, model: Any, places: list[tuple[Any, str]], first: int) -> None:
        until = self.settings.thaw_at
        own = [getattr(module, attribute) for module, attribute in places]
        for parameter in model.parameters():
            if any(parameter is one for one in own):
                train_from_row(parameter, first, until=until)
            elif until is None:
                parameter.requires_grad_(False)
            else:
                thaw_at(parameter, until)

    @staticmethod
    def _places(embedding: Any, head: Any) -> list[tuple[Any, str]]:
        """Return the modules and attributes of the weights with one row for each token; a tied weight once."""
        places = [(embedding, "weight")]
        if head is not None and head.weight is not embedding.weight:
            places.append((head, "weight"))
        if getattr(head, "bias", None) is not None:
            places.append((head, "bias"))
        return places

    def _rows(self, old: Tensor, *, seed: int, std: float) -> Rows:
        """Return the function that computes rows of the larger weight from those of ``old``. New random rows depend on ``seed``
        and their number only, and not on which rows a rank needs."""
        import torch

        before = len(old)
        known: dict[str, tuple[Tensor, Tensor]] = {}

        def statistics(read: Read) -> tuple[Tensor, Tensor]:
            """Mean and standard deviation of the old rows, in fp32."""
            if not known:
                parts = [read(old, at, min(at + CHUNK, before)).double() for at in range(0, before, CHUNK)]
                mean = torch.stack([part.sum(0) for part in parts]).sum(0) / before
                square = torch.stack([((part - mean) ** 2).sum(0) for part in parts]).sum(0) / before
                known["found"] = mean.float(), square.sqrt().float()
            return known["found"]

        def new_row(read: Read, row: int) -> Tensor:
            pieces = self.pieces.get(row)
            if pieces is None:
                return statistics(read)[0]  # of padding: no logit that stands out
            if self.settings.start == "mean":
                return torch.stack([read(old, piece, piece + 1)[0].float() for piece in pieces]).mean(0)
            noise = torch.randn(old.shape[1:], generator=torch.Generator().manual_seed(seed + row))
            if self.settings.start == "random":
                return noise * std
            mean, deviation = statistics(read)
            return mean + deviation * noise

        def rows(read: Read, start: int, stop: int) -> Tensor:
            found = torch.zeros((stop - start, *old.shape[1:]), dtype=torch.float32)
            if start < before:
                kept = read(old, start, min(stop, before))
                found[: len(kept)] = kept.float()
            for row in range(start, stop):
                if row >= before or self.pieces.get(row):
                    found[row - start] = new_row(read, row)
            return found.to(old.dtype)

        return rows


def set_rows(model: Any, before: int, rows: int) -> None:
    """Set the number of rows in the config of ``model``, and where its modules keep it."""
    model.config.get_text_config().vocab_size = rows
    for module in model.modules():
        if getattr(module, "vocab_size", None) == before:
            module.vocab_size = rows


def listed(pieces: dict[int, tuple[int, ...]], names: list[str]) -> bytes:
    """Return the content of ``NEW_TOKENS``."""
    return json.dumps({"ids": [*pieces], "tokens": names}, ensure_ascii=False, indent=1).encode() + b"\n"
