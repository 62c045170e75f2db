"""The tokenizer of a model folder: its tokenizer.json unchanged, regardless of the class that transformers would use.

transformers 5 rebuilds many tokenizer classes from the vocabulary alone, with the rules of the class and not those of the
file (``TokenizersBackend.convert_to_native_format``, 5.23), and adds tokens that the class expects. The model,
however, was trained with the file.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pretrain.models.hub.files import read_object
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, did_you_mean, one_line
from pretrain.runtime.folders import is_inside

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = (  # files of a tokenizer in a model folder
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "tekken.json"),
    "new_tokens.json",  # of a vocabulary that has grown
    *("chat_template.jinja", "chat_template.json", "tokenization_*.py"),
)
CONVERTED_BY = {"*.model": "sentencepiece", "*.tiktoken": "tiktoken", "tekken.json": "mistral_common"}  # file → package
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")  # of a document; a chat model's eos_token ends a turn
DOCUMENT_ENDS = (*TEXT_ENDS, "</s>", "<eos>")
PROBE_LINES = (  # lines that reveal different tokenization rules: digits, spaces, contractions, accents, scripts, line ends
    "In 1984 it cost 1234567.89, they'd say; I'LL pay 12345 on 2024-05-17.",
    "  two  spaces\tand a tab\n\n\nthen   three  ",
    "naïve café Ångström e\u0301 ﬁ ½ Straße İstanbul",
    "漢字かな交じり文 한국어 العربية हिन्दी 🙂👩‍👩‍👧",
    "def f(x):\n    return x**2 + 0x1F  # <html> &amp;\r\n",
)
CONVERT = "python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{0}').save_pretrained('{0}')\""
ALTERNATIVES = (
    "copy tokenizer.json from the model's own folder, name another folder or Hub id as model.tokenizer_name, or convert the "
    "files with the class that they were made for (tokenizer_class in tokenizer_config.json)"
)


@dataclass(frozen=True)
class Boundaries:
    """The tokens around every document: ``bos`` before it (``None`` if there is none) and ``separator`` after it."""

    bos: int | None
    separator: int

    @property
    def first(self) -> int:
        """Return the token before a document: BOS, or the separator after the document before it."""
        return self.separator if self.bos is None else self.bos


class FolderTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that uses ``backend`` exactly as given. ``save_pretrained`` writes ``files`` unchanged."""

    def __init__(self, backend: Tokenizer, files: dict[str, bytes], **options: Any) -> None:
        super().__init__(tokenizer_object=backend, **options)
        self._tokenizer = backend  # transformers modifies the copy that it makes
        self.files = files

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> tuple[str, ...]:
        """Write the tokenizer's files into a folder, byte for byte as they were read, and return their paths."""
        paths = [Path(save_directory) / name for name in self.files]
        for path, content in zip(paths, self.files.values(), strict=True):
            path.write_bytes(content)
        return tuple(str(path) for path in paths)


def folder_tokenizer(folder: Path, *, code: bool = False) -> Any:
    """Return the fast tokenizer of ``folder``. With ``code=True`` the folder's own Python may run.

    A notice is printed when transformers' AutoTokenizer would give different tokens. Raises ``UserError`` when there is no
    tokenizer.
    """
    _check_links(folder)
    if not (folder / "tokenizer.json").exists():
        return _converted(folder, code)
    with _as_user_error(f"{folder}: no usable tokenizer: tokenizer.json"):
        return _from_file(folder, code)


def _from_file(folder: Path, code: bool) -> FolderTokenizer:
    """Return the tokenizer of the folder's tokenizer.json, and print a notice if AutoTokenizer's differs from it."""
    backend, config = Tokenizer.from_file(str(folder / "tokenizer.json")), _read_json(folder, "tokenizer_config.json")
    _check_ids(folder, backend)
    # This also validates the file, which may name an unknown token that its vocabulary lacks.
    expected = [_without_truncation(backend).encode(line, add_special_tokens=False).ids for line in PROBE_LINES]
    auto = _auto(folder, code)
    if not isinstance(auto, str) and not hasattr(auto, "backend_tokenizer"):  # e.g. RagTokenizer, which wraps two
        auto = f"{type(auto).__name__} is not a tokenizer of the tokenizers library"
    named, unknown = _special_tokens(folder, config, backend, auto)
    adds = _adds_bos(backend, named.get("bos_token"), config.get("add_bos_token"))
    finding = f"tokenizer.json has no {', '.join(unknown)}, named in tokenizer_config.json" if unknown else None
    if isinstance(auto, str):
        finding = f"AutoTokenizer can't load it ({auto})"
    elif _are_equivalent(auto.backend_tokenizer, backend):
        # Both are equivalent. The token cache was keyed by AutoTokenizer's serialisation, so its keys stay valid.
        backend = auto.backend_tokenizer
    else:
        finding = _difference(auto, backend, expected) or finding
    if finding:
        notice(f"{folder}: {finding}; the run uses tokenizer.json as it is, and exports it unchanged")
    template = _chat_template(folder, config)
    return FolderTokenizer(backend, _files(folder), **named, add_bos_token=adds, chat_template=template)


def _check_ids(folder: Path, backend: Tokenizer) -> None:
    """Raise ``UserError`` when two tokens have the same id. The token cache serialises the tokenizer again, and one of the two
    would be lost."""
    owners: dict[int, str] = {}
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if owners.setdefault(number, token) != token:
            one, other = sorted((owners[number], token))
            raise UserError(
                f"tokenizer.json assigns one id to two tokens: {one[:40]!r} and {other[:40]!r} are both {number}"
            )


def boundaries(tokenizer: Any, *, bos: bool | str, separator: str | int) -> Boundaries:
    """Return the tokens around the documents of a run. The arguments are ``dataset.bos`` and ``dataset.separator``.

    Raises ``UserError`` for a token that the tokenizer does not have.
    """
    end = _separator(tokenizer, separator)
    first = tokenizer.bos_token_id
    if bos is True and first is None:
        raise UserError("dataset.bos=true: the tokenizer has no bos_token; set dataset.bos=false")
    # If one token is both BOS and separator, the separator of the previous document already precedes each document.
    wanted = bos if isinstance(bos, bool) else adds_bos(tokenizer) and first != end
    return Boundaries(first if wanted else None, end)


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts a BOS before a text."""
    return _adds_bos(tokenizer.backend_tokenizer, tokenizer.bos_token, tokenizer.init_kwargs.get("add_bos_token"))


def _adds_bos(backend: Tokenizer, bos: str | None, add_bos_token: Any) -> bool:
    """Return ``add_bos_token`` if the config sets it, otherwise whether the post-processor adds a BOS."""
    if bos is None or isinstance(add_bos_token, bool):
        return bos is not None and add_bos_token is True
    return _without_truncation(backend).encode("").ids[:1] == [backend.token_to_id(bos)]


def _separator(tokenizer: Any, wanted: str | int) -> int:
    """Return the id of the token that ends each document, from the value of ``dataset.separator``."""
    vocabulary = tokenizer.get_vocab()
    if isinstance(wanted, int):
        if wanted in vocabulary.values():
            return wanted
        raise UserError(
            f"dataset.separator={wanted}: the tokenizer's ids are 0 to {max(vocabulary.values(), default=0)}"
        )
    if wanted != "auto":
        if wanted in vocabulary:
            return int(vocabulary[wanted])
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        raise UserError(
            f"dataset.separator={wanted!r}: not a token of the tokenizer{did_you_mean(wanted, special)}; "
            "give one token, or its id"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text token (eos_token): name the token that ends a document, or its id, as "
            "dataset.separator"
        )
    ends_text = _end_of_text(tokenizer) if tokenizer.chat_template is not None else None
    if ends_text is not None:
        notice(
            f"dataset.separator=auto: {ends_text} ends each document; {tokenizer.eos_token}, the eos_token of this instruct "
            "tokenizer, ends a turn"
        )
        return int(vocabulary[ends_text])
    return int(tokenizer.eos_token_id)


def _end_of_text(tokenizer: Any) -> str | None:
    """Return the special token that ends a text in a chat model's tokenizer; ``None`` if its eos_token does or there is none."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = tokenizer.eos_token in DOCUMENT_ENDS
    return None if named else next((token for token in TEXT_ENDS if token in special), None)


# Without a tokenizer.json ----------------------------------------------------------------------------------------------


def _converted(folder: Path, code: bool) -> Any:
    """Return the tokenizer that transformers converts from older files. Raises ``UserError``, which names what is missing."""
    missing = f"{folder}: no usable tokenizer: it has no tokenizer.json"
    listed = max(len(_read_json(folder, "vocab.json")), _lines(folder / "vocab.txt"))
    for file, package in [(f, p) for kind, p in CONVERTED_BY.items() for f in sorted(folder.glob(kind))]:
        if importlib.util.find_spec(package) is None and not listed:
            raise UserError(
                f"{missing} but {file.name}; create one once, where {package} and protobuf are installed: "
                f"{CONVERT.format(folder)}"
            )
    if not listed and not code and not any(any(folder.glob(kind)) for kind in CONVERTED_BY):
        raise UserError(f"{missing}; {ALTERNATIVES}")
    auto = _auto(folder, code)
    if isinstance(auto, str):
        raise UserError(f"{missing}, and transformers can't create one ({auto}); {ALTERNATIVES}")
    if not auto.is_fast:
        raise UserError(f"{folder}: no fast tokenizer (tokenizer.json)")
    if len(auto.get_vocab()) < listed:  # a class that can't read these files returns only its few built-in tokens
        raise UserError(
            f"{missing}, and transformers' {type(auto).__name__} has {len(auto.get_vocab())} tokens where the folder's files "
            f"have {listed}; {ALTERNATIVES}"
        )
    return auto


def _lines(file: Path) -> int:
    """Return the number of lines of ``file``; 0 if it does not exist."""
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def _auto(folder: Path, code: bool) -> Any:
    """Return transformers' AutoTokenizer of ``folder``, or the reason why it can't be loaded."""
    try:
        with _as_user_error(""):
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=code)
    except UserError as error:
        return str(error)


# The folder's files ----------------------------------------------------------------------------------------------------


@contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Convert any error that a library raises for a broken file into a ``UserError``. A panic in Rust is not an
    ``Exception``, but it is converted too."""
    try:
        with _without_panic_message():
            yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise UserError(f"{what}: {one_line(error)}" if what else one_line(error)) from None


@contextmanager
def _without_panic_message() -> Iterator[None]:
    """Drop what Rust prints to descriptor 2 when it panics, before Python receives the panic; pass on everything else."""
    with TemporaryFile() as printed:
        terminal = os.dup(2)
        os.dup2(printed.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error)
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            if not panicked:
                printed.seek(0)
                os.write(2, printed.read())


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of ``folder``; an empty one if the file does not exist."""
    return read_object(folder / name, label=f"{folder}: no usable tokenizer: {name}") or {}


def _check_links(folder: Path) -> None:
    """Raise ``UserError`` when a file of the tokenizer is a link out of ``folder`` to a file of a different name (``vocab.txt``
    → ``~/.netrc``), because the export would copy that file. Links to a file of the same name are allowed."""
    for path in _tokenizer_paths(folder):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if target.name != path.name and not is_inside(path, folder):
                raise UserError(
                    f"{folder}: {path.name} is a link to {target}, a file of another name outside the folder; copy it, if "
                    "it is this tokenizer's"
                )


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in _tokenizer_paths(folder) if path.is_file()}


def _tokenizer_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if any(fnmatch(path.name, kind) for kind in FILES))


def _chat_template(folder: Path, config: dict[str, Any]) -> Any:
    """Return the chat template from any of the files that may hold it. Only its presence matters here."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8", errors="replace")
    return config.get("chat_template") or _read_json(folder, "chat_template.json").get("chat_template")


def _special_tokens(
    folder: Path, config: dict[str, Any], backend: Tokenizer, auto: Any
) -> tuple[dict[str, str], list[str]]:
    """Return the special tokens (those that the folder names, otherwise those of the class) that tokenizer.json contains, and a
    list of those that the folder names but tokenizer.json does not contain."""
    named = _read_json(folder, "special_tokens_map.json") | config
    found, unknown = {}, []
    for key in SPECIAL:
        value = named[key] if key in named else getattr(auto, key, None)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str) and backend.token_to_id(token) is not None:
            found[key] = token
        elif key in named and token is not None:
            unknown.append(f"{key} {token!r}")
    return found, unknown


# Comparison with AutoTokenizer -----------------------------------------------------------------------------------------


def _are_equivalent(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether both encode and decode every text identically, apart from the special tokens added around it."""
    a, b = one.to_str(), other.to_str()
    return a == b or _rules(a) == _rules(b)


def _rules(serialized: str) -> Any:
    """Return the parts of a tokenizer that determine ids and text, in normal form: without post-processor, truncation and
    padding, and with equivalent spellings of defaults unified."""
    content = json.loads(serialized)
    return _plain({key: content[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens", "decoder")})


def _plain(node: Any) -> Any:
    """Return ``node`` of a serialised tokenizer with equivalent spellings of defaults unified."""
    if isinstance(node, list):
        return [_plain(value) for value in node] if node and isinstance(node[0], dict) else node
    if not isinstance(node, dict) or "vocab" in node:
        prefixes = ("continuing_subword_prefix", "end_of_word_suffix")
        return node | {key: node.get(key) or None for key in prefixes} if isinstance(node, dict) else node
    if node.get("type") == "ByteLevel":
        node = {key: value for key, value in node.items() if key != "trim_offsets"}
    plain = {key: _plain(value) for key, value in node.items()}
    if isinstance(plain.get("decoder"), dict) and plain["decoder"].get("type") == "ByteLevel":
        plain["decoder"] = {"type": "ByteLevel"}  # decoding ignores its options
    return plain


def _without_truncation(backend: Tokenizer) -> Tokenizer:
    """Return ``backend``, or a copy of it without truncation and padding if its file sets them."""
    if backend.truncation is None and backend.padding is None:
        return backend
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _difference(auto: Any, backend: Tokenizer, expected: list[list[int]]) -> str | None:
    """Return how AutoTokenizer differs from tokenizer.json: in the ids of ``PROBE_LINES``, for which ``expected`` holds those of
    the file, or in the vocabulary. Return ``None`` if no difference is found."""
    name, ours = type(auto).__name__, backend.get_vocab()
    for line, ids in zip(PROBE_LINES, expected, strict=True):
        try:
            with _as_user_error(""):
                found = auto(line, add_special_tokens=False)["input_ids"]
        except UserError as error:  # a class whose unknown token is not in the vocabulary
            return f"AutoTokenizer ({name}) can't encode {line!r} ({error})"
        if found != ids:
            many = f" ({len(found)} instead of {len(ids)})" if len(found) != len(ids) else ""
            return f"AutoTokenizer ({name}) would give other tokens{many} for {line!r}"
    invented = sorted(auto.get_vocab().keys() - ours.keys())
    if invented:
        return f"AutoTokenizer ({name}) would add {len(invented)} tokens, such as {invented[0]!r}"
    return None
