"""The base classes of datasets: `Source` yields documents; `FileSource` lists files and how they are read. A `Mixture`
(`pretrain.data.sources.mixture`) is a dataset that consists of others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt
from pydantic_core import PydanticCustomError

from pretrain.data.reading.condition import Refused, check_syntax
from pretrain.data.reading.template import RefusedTemplate, check_template
from pretrain.data.reading.units import ReadOptions, SourceFile, key_of, printable
from pretrain.runtime.errors import UserError


def _condition(text: str) -> str:
    try:
        return check_syntax(text)
    except Refused as error:
        raise PydanticCustomError("where", "{reason}", {"reason": str(error)}) from None


def _template(text: str) -> str:
    try:
        return check_template(text)
    except RefusedTemplate as error:
        raise PydanticCustomError("text_template", "{reason}", {"reason": str(error)}) from None


@dataclass(frozen=True, kw_only=True)
class Dataset(ABC):
    """A dataset: one source of documents, or a mixture of several.

    In an evaluation domain and in a part of a mixture, ``auto`` stands for the value of the run's dataset.

    Attributes:
        name: Name of the domain in the metrics; null: derived from the path.
        document_mask: true: restrict attention and loss to within each document.
        bos: Start each document and sequence with the tokenizer's bos_token: auto (if the tokenizer itself adds it) |
            true | false.
        separator: Token, or its id, that ends each document; auto: the eos_token; for a chat model's tokenizer
            <|endoftext|>.
    """

    name: str | None = None
    document_mask: bool = False
    bos: Literal["auto"] | bool = "auto"
    separator: Annotated[str, Field(min_length=1)] | NonNegativeInt = "auto"

    @property
    def domain(self) -> str:
        """The name of this dataset in metrics and messages."""
        return self.name or printable(self.default_name())

    def default_name(self) -> str:
        """Return the name of the dataset when ``name`` is not set."""
        return type(self).__name__.lower()

    def described(self) -> str:
        """Return a description for messages, in the terms of the configuration."""
        return f"dataset={self.domain}"

    @abstractmethod
    def check_for_training(self, path: str) -> None:
        """Check settings against each other. ``path`` is the key of this dataset, such as ``dataset.parts.es``; it is
        trained on.

        Raises ``UserError`` for settings that exclude each other.
        """

    @abstractmethod
    def sources(self) -> dict[str, Source]:
        """Return the sources of documents by the name of their part; a source alone is one part, under its own name."""

    @abstractmethod
    def under(self, name: str) -> dict[str, Source]:
        """Return the sources by their names in a mixture that has this dataset as part ``name``."""


@dataclass(frozen=True, kw_only=True)
class Source(Dataset):
    r"""A dataset that yields documents with an identity, and the settings that all sources share.

    A subclass is a frozen, keyword-only dataclass with `documents` and `fingerprint`. Its documents are read once and kept in
    the cache under the fingerprint, from which they are tokenized, in several processes if there are many.

    ``held_out`` and ``train_data_ratio`` select documents by the hash of their text, so the same ones are selected on every
    machine.

    Attributes:
        role: What its held-out documents measure: new (what the run learns) | base (what it may forget) | auto: base in
            evaluation.domains, new elsewhere.
        text_column: Column (tables) or key (JSON) that contains the text.
        text_template: Joins columns into the text, such as '{title}\n\n{body}'; null: the text is ``text_column``.
        where: Keeps only documents for which this is true, such as "lang == 'es' and score > 0.8"; null: keeps all.
        errors: Bytes that are not valid UTF-8: strict (an error with file and position) | replace (by U+FFFD).
        max_document_chars: Plain text longer than this is split into several documents, at paragraphs, lines or
            sentences.
        held_out: Share of the documents held out for evaluation, selected by a hash of their text; 1: all, of an
            evaluation domain.
        max_tokens: Number of tokens after which the dataset ends, at the end of a document; the rest is neither read nor
            tokenized. null: no limit.
        train_data_ratio: Share of the remaining documents to train on, selected the same way.
        deduplicate: Keep only one of several documents that are identical (exact or true), or nearly so (near: MinHash,
            needs datasketch).
        packing: How documents become sequences: stream: one after the other, cut at every sequence_length tokens |
            best_fit: into the sequence that they fill best, cut only where they are longer; the rest is padding.
        fim_rate: Share of the documents that are rearranged to learn filling in the middle (code models), by the tokens of
            the tokenizer; 0: none.
        fim_spm_rate: Share of the rearranged documents with the suffix first (SPM instead of PSM).
        num_workers: Number of tokenizer processes; null: one per core, none with one or two cores.
    """

    role: Literal["auto", "new", "base"] = "auto"
    text_column: str = "text"
    text_template: Annotated[str, AfterValidator(_template)] | None = None
    where: Annotated[str, AfterValidator(_condition)] | None = None
    errors: Literal["strict", "replace"] = "strict"
    max_document_chars: Annotated[int, Field(ge=16)] = 20_000
    held_out: Annotated[float, Field(ge=0, le=1)] = 0.05
    max_tokens: PositiveInt | None = None
    train_data_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    deduplicate: bool | Literal["exact", "near"] = False
    packing: Literal["stream", "best_fit"] = "stream"
    fim_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    fim_spm_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    num_workers: PositiveInt | None = None

    def check_for_training(self, path: str) -> None:
        if self.held_out == 1:
            raise UserError(f"{path}.held_out=1: input should be less than 1 for text that is trained on")

    def sources(self) -> dict[str, Source]:
        return self.under(self.domain)

    def under(self, name: str) -> dict[str, Source]:
        return {name: self}

    def options(self) -> ReadOptions:
        """Return the settings that determine how documents are read from files."""
        return ReadOptions(self.text_column, self.errors, self.max_document_chars, self.where, self.text_template)

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that is equal exactly when `documents` yields the same documents.

        For example, it contains the query and the version of a database. A change is a change of the run's data, with which
        a run is not resumed.
        """

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yield the documents in a fixed order. It is called again where a process was killed while it read them."""

    def identity(self) -> list[Any]:
        """Return the JSON-serialisable values that determine the documents."""
        return ["documents", type(self).__module__, type(self).__qualname__, self.fingerprint()]

    def listed(self, cache: Path) -> list[SourceFile]:
        """Return the files from which the documents are tokenized, and write them into ``cache`` before if they are not there."""
        from pretrain.data.sources.kept import kept_documents

        return kept_documents(self, cache)


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """A dataset of files in the formats of `pretrain.data.reading.readers.READERS`."""

    @abstractmethod
    def files(self) -> list[SourceFile]:
        """Return all files in a fixed order. Raises ``UserError`` when there are none."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """Return the JSON-serialisable values that determine which files there are."""

    def fingerprint(self) -> str:
        """Return a hash of the identity. The content of the files is compared part by part."""
        return key_of(self.identity())

    def documents(self) -> Iterator[str]:
        """Yield the text of the files."""
        from pretrain.data.reading.cut import cut
        from pretrain.data.reading.readers import read

        for piece in (piece for file in self.files() for piece in cut(file, self.options())):
            yield from (document for document in read(piece, self.options()) if isinstance(document, str))

    def listed(self, cache: Path) -> list[SourceFile]:
        return self.files()
