"""What every dataset has in common. A source says which files there are and how to read them; it reads nothing
itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pretrain.data.reading.units import ReadOptions, SourceFile, printable


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """``held_out`` and ``train_data_ratio`` choose documents by the hash of their text: the same ones on every
    machine. ``bos``: put the tokenizer's bos_token before each document (auto: if the tokenizer itself does so).
    ``separator``: the token that ends each document, or its id (auto: the tokenizer's eos_token, in a chat model's the token
    that ends a text). In an evaluation domain auto means: as in the run's dataset."""

    name: str | None = None
    text_column: str = "text"
    errors: Literal["strict", "replace"] = "strict"
    max_document_chars: Annotated[int, Field(ge=16)] = 20_000
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    train_data_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    deduplicate: bool = False
    document_mask: bool = False
    bos: Literal["auto"] | bool = "auto"
    separator: Annotated[str, Field(min_length=1)] | NonNegativeInt = "auto"
    num_workers: PositiveInt | None = None

    @property
    def domain(self) -> str:
        """The name of this dataset in metrics and messages."""
        return self.name or printable(self.default_name())

    def options(self) -> ReadOptions:
        return ReadOptions(self.text_column, self.errors, self.max_document_chars)

    @abstractmethod
    def default_name(self) -> str: ...

    @abstractmethod
    def described(self) -> str:
        """What the user named, for messages."""

    @abstractmethod
    def files(self) -> list[SourceFile]:
        """All files in a fixed order. Raises ``UserError`` when there are none."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """What decides which files there are, fit for JSON."""
