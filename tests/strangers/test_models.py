# ruff: noqa: E501  (a row of a table is one line)
"""Folders of models as strangers have them: edited, broken, contradictory. Each works or is refused in one line that names the
file or the key; nothing in the folder changes."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.models.causal_lm import Pretrained
from pretrain.models.hub.files import SAMPLE
from pretrain.runtime.errors import UserError

Spoil = Callable[[Path], object]
W, C, G, INDEX = "model.safetensors", "config.json", "generation_config.json", "model.safetensors.index.json"
DEEP = "[" * 200_000 + "]" * 200_000


def put(name: str, content: str | bytes) -> Spoil:
    return lambda m: (m / name).write_bytes(content.encode() if isinstance(content, str) else content)


def edit(name: str, **changes: Any) -> Spoil:
    return lambda m: (m / name).write_text(json.dumps(json.loads((m / name).read_text()) | changes))


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(m: Path) -> None:
        content = (m / W).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        found = json.loads(content[8 : 8 + length])
        changed = change(found)
        new = json.dumps(found if changed is None else changed).encode()
        (m / W).write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])

    return spoil


def first(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change what the header says of one tensor."""
    return header(lambda h: change(next(v for k, v in h.items() if k != "__metadata__")) and None)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(m: Path) -> None:
        found = load_file(m / W)
        change(found)
        save_file(found, m / W, metadata={"format": "pt"})

    return spoil


def index(weight_map: Any) -> Spoil:
    def spoil(m: Path) -> None:
        (m / W).rename(m / "model-00001-of-00001.safetensors")
        (m / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


EMBEDDING = "model.embed_tokens.weight"
REFUSED: dict[str, tuple[Spoil, str]] = {
    # what peft would have loaded in the folder's place
    "an adapter": (put("adapter_config.json", '{"base_model_name_or_path": "/elsewhere"}'), r"is an adapter \(adapter_config\.json\); merge it"),
    # config.json
    "config.json: a list": (put(C, "[]"), r"config\.json: not a JSON object, but list"),
    "config.json: nothing": (put(C, ""), r"config\.json can't be read"),
    "config.json: not UTF-8": (put(C, b'{"model_type": "\xff"}'), r"config\.json can't be read"),
    "config.json: deep": (put(C, DEEP), r"config\.json can't be read: .*recursion"),
    "config.json: a number of 5000 digits": (put(C, '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"), r"config\.json can't be read"),
    "config.json: a folder": (lambda m: ((m / C).unlink(), (m / C).mkdir()), r"config\.json can't be read"),
    "model_type: a list": (edit(C, model_type=["llama"]), "model_type is .*not a name"),
    "model_type: null": (edit(C, model_type=None), "model_type is 'None', not a name"),
    "hidden_size: text": (edit(C, hidden_size="128"), r"config\.json: .*hidden_size.* expected int"),
    "hidden_size: 10^30": (edit(C, hidden_size=10**30), "can't be built"),
    "hidden_size: 64 of 128": (edit(C, hidden_size=64), "weights are missing from its files or have another shape"),
    "layers: -1": (edit(C, num_hidden_layers=-1), "num_hidden_layers=-1"),
    "layers: 7 of 6": (edit(C, num_hidden_layers=7), "9 weights are missing from its files or have another shape"),
    "layers: 2 million": (edit(C, num_hidden_layers=2_000_000), "num_hidden_layers=2000000, its files hold 56 tensors in all"),
    "layers: 10^400": (edit(C, num_hidden_layers=10**400), "num_hidden_layers=1000"),
    "heads: 0": (edit(C, num_attention_heads=0), "num_attention_heads=0"),
    "heads: 3 of 128": (edit(C, num_attention_heads=3), r"config\.json: .*not a multiple"),
    "vocab_size: 0": (edit(C, vocab_size=0), "embedding 0 rows"),
    "vocab_size: more than the embedding": (edit(C, vocab_size=5000), f"or have another shape, e.g. {re.escape(EMBEDDING)}"),
    "vocab_size: less than the tokenizer": (edit(C, vocab_size=100), "embedding 100 rows"),
    "rope: nonsense": (edit(C, rope_parameters={"rope_type": "nonsense"}), "can't be built: 'nonsense'"),
    "activation: nonsense": (edit(C, hidden_act="evil"), "can't be built: 'evil'"),
    "dtype: nonsense": (edit(C, dtype="float99"), r"config\.json: .*float99"),
    "text_config: a list": (edit(C, text_config=[1]), "can't be built"),
    "tied: a list": (edit(C, tie_word_embeddings=[]), r"config\.json: .*tie_word_embeddings"),
    "untied, and no head": (edit(C, tie_word_embeddings=False), r"or have another shape, e.g. lm_head\.weight"),
    "quantized": (edit(C, quantization_config={"quant_method": "fp8"}), r"quantization_config \(fp8\)"),
    # generation_config.json
    "generation_config.json: broken": (put(G, "{"), r"generation_config\.json can't be read"),
    "generation_config.json: a list": (put(G, "[]"), r"generation_config\.json: not a JSON object, but list"),
    "generation_config.json: deep": (put(G, DEEP), r"generation_config\.json can't be read"),
    "generation_config.json: a wrong part": (edit(G, watermarking_config=3), r"generation_config\.json: "),
    # model.safetensors
    "weights: a folder": (lambda m: ((m / W).unlink(), (m / W).mkdir()), r"model\.safetensors can't be read: Is a directory"),
    "weights: nothing": (put(W, b""), r"model\.safetensors is not a complete safetensors file"),
    "weights: a header of 2^63": (put(W, struct.pack("<Q", 2**63) + b"{}"), r"is not a complete safetensors file: .*its header does not fit"),
    "header: a list": (header(lambda h: []), r"is not a complete safetensors file"),
    "header: deep": (put(W, struct.pack("<Q", len(DEEP)) + DEEP.encode()), r"is not a complete safetensors file: its header is not safetensors \(Recursion"),
    "header: not UTF-8": (put(W, struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe"), "its header is not safetensors"),
    "header: no offsets": (first(lambda e: e.pop("data_offsets")), "its header is not safetensors"),
    "header: offsets of text": (first(lambda e: e.update(data_offsets=["0", "1"])), "its header is not safetensors"),
    "header: offsets backwards": (first(lambda e: e["data_offsets"].reverse()), "is not a complete safetensors file"),
    "header: negative offsets": (first(lambda e: e.update(data_offsets=[-8, 0])), "sizes that are not valid numbers"),
    "header: a shape too large": (first(lambda e: e.update(shape=[10**9, 10**9])), r"bytes for BF16 of \[1000000000, "),
    "header: a type that is none": (first(lambda e: e.update(dtype="F99")), "its header is not safetensors .*F99"),
    "header: a tensor that is a list": (header(lambda h: h.update(x=[])), "its header is not safetensors"),
    "weights: 100 bytes short": (lambda m: (m / W).write_bytes((m / W).read_bytes()[:-100]), "expected by its header"),
    "weights: bytes behind": (lambda m: (m / W).write_bytes((m / W).read_bytes() + b"x"), "expected by its header"),
    "a weight is missing": (weights(lambda w: w.pop("model.norm.weight")), r"1 weights .*model\.norm\.weight"),
    "a weight is transposed": (weights(lambda w: w.update({"model.layers.0.mlp.up_proj.weight": w["model.layers.0.mlp.up_proj.weight"].t().contiguous()})), r"or have another shape, e.g. model\.layers\.0\.mlp\.up_proj"),
    "tied, and a head of its own": (weights(lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1})), r"config\.json sets tie_word_embeddings: true, but"),
    # the index of several files
    "index: a shard that is not there": (index({EMBEDDING: "model-00002-of-00002.safetensors"}), "1 of 1 weight files are missing"),
    "index: a name that no file can have": (index({EMBEDDING: "a" * 10_000}), "1 of 1 weight files are missing, e.g. a{200}$"),
    "index: a list": (index([1]), r"index\.json is invalid"),
    "index: numbers for files": (index({EMBEDDING: 3}), r"index\.json is invalid"),
    "index: deep": (lambda m: ((m / W).unlink(), (m / INDEX).write_text(DEEP)), r"index\.json is invalid"),
    "index: outside": (index({EMBEDDING: "../x.safetensors"}), "outside the folder"),
}  # fmt: skip
TAKEN: dict[str, Spoil] = {
    "as it is": lambda m: None,
    "torch_dtype: nonsense": edit(C, torch_dtype=[1]),
    "auto_map: a list": edit(C, auto_map=[1]),
    "an unknown key": edit(C, what_is_this={"deep": [1]}),
    "no generation_config.json": lambda m: (m / G).unlink(),
    "a tensor too many": weights(lambda w: w.update(extra=torch.zeros(3))),
    "fp32 weights": weights(lambda w: w.update({name: t.float() for name, t in w.items()})),
    "tied, and a head that is the embedding": weights(lambda w: w.update({"lm_head.weight": w[EMBEDDING].clone()})),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def use(folder: Path) -> None:
    """As a run does: look at it, build it whole, build it as shapes alone."""
    spec = Pretrained(name_or_path=str(folder))
    spec.check(64)
    model = spec.build(param_dtype=torch.float32, device=torch.device("cpu"), seed=0)
    spec.build_on_meta(param_dtype=torch.float32)
    assert model(torch.arange(8)[None], torch.arange(1, 9)[None]).isfinite()


@pytest.mark.parametrize("row", REFUSED)
def test_refused_in_one_line(row: str, folder: Path) -> None:
    spoil, words = REFUSED[row]
    spoil(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=words) as raised:
        use(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 700
    assert contents(folder) == before


@pytest.mark.parametrize("row", TAKEN)
def test_taken(row: str, folder: Path) -> None:
    TAKEN[row](folder)
    before = contents(folder)
    use(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("row", ["config.json: deep", "header: a shape too large", "layers: 7 of 6", "generation_config.json: broken"])  # fmt: skip
def test_on_the_command_line_it_is_exit_code_2(row: str, folder: Path, tmp_path: Path, base_arguments: Any, command: Any) -> None:  # fmt: skip
    spoil, words = REFUSED[row]
    spoil(folder)
    run = tmp_path / "run"
    code, _, err = command([*base_arguments, f"model_name={folder}", f"output_dir={run}"])
    assert code == 2, err
    assert re.search(words, err)
    assert "Traceback" not in err
    assert not (run / "checkpoints").exists()


def test_a_model_that_sees_the_future_does_not_train(tmp_path: Path, base_arguments: Any, command: Any) -> None:
    shape = "{model_type: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}"
    run = tmp_path / "run"
    code, _, err = command([*base_arguments, "model=scratch", f"model.overrides={shape}", f"output_dir={run}"])
    assert code == 2, err
    assert "is not causal: its logits change with later tokens" in err
    assert "Traceback" not in err
    assert not (run / "checkpoints").exists()
