"""Files of a bounded size, in the layout that the Hub knows; what a model card says and what it keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.checkpoint.train_state import TrainState
from pretrain.distributed.sharding import TensorShard, write
from pretrain.models.causal_lm import Pretrained
from pretrain.models.hub import export
from pretrain.models.hub.model_card import model_card, public
from pretrain.models.language_model import LanguageModel
from pretrain.runtime.files import write_files
from pretrain.telemetry.events import PartCount
from tests.models.tiny import tiny


def weights(*sizes: int) -> dict[str, torch.Tensor]:
    """Weights of so many kB each."""
    return {f"w{i}": torch.full((250 * size,), float(i)) for i, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        ((1, 1, 1), [["w0", "w1"], ["w2"]]),
        ((2, 2), [["w0"], ["w1"]]),
        ((1, 5, 1), [["w0"], ["w1"], ["w2"]]),
        ((), []),
    ],
)
def test_split(sizes: tuple[int, ...], files: list[list[str]]) -> None:
    found = export.split(weights(*sizes), "2KB")
    assert [list(shard) for shard in found] == files
    assert all(size == 1000 * sizes[int(name[1:])] for shard in found for name, size in shard.items())


def test_shards_of_several_ranks_have_one_numbering(tmp_path: Path) -> None:
    """A rank with nothing to write is no gap."""
    shares: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, (name, tensor) in enumerate(weights(1, 1, 2, 1, 1).items()):
        shares[2 * (number % 2)][name] = tensor
    plan = [export.split(own, "2KB") for own in shares]
    for rank, own in enumerate(shares):
        export.save_shards(own, tmp_path, plan=plan, rank=rank)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(f.name for f in tmp_path.glob("*.safetensors")) == names
    assert index["metadata"]["total_size"] == 6000
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], weights(1, 1, 2, 1, 1)[name])


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "opt", "phi"])
def test_a_checkpoint_s_names_and_an_export_s_are_both_read(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Mixtral keeps its experts in one weight in memory, and one by one on the Hub."""
    model = LanguageModel(tiny(name, vocab_size=300))
    files = export.companion_files(model.hf, tokenizer, dtype=None)
    for folder in ("checkpoint", "export"):
        write_files(files, tmp_path / folder)
    state = {n: t.detach() for n, t in model.hf_state().items()}
    pieces = {n: TensorShard(t, 0, tuple(t.shape)) for n, t in state.items()}
    write(tmp_path / "checkpoint" / "model.safetensors", pieces)
    export.save_full(model.hf, dict(state), tmp_path / "export", shard_size="5GB")
    ids = torch.arange(12)[None]
    expected = model.eval().hf(ids).logits
    for folder in ("checkpoint", "export"):
        hf = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, attn_implementation=model.hf.config._attn_implementation
        )
        assert torch.equal(hf.eval()(ids).logits, expected), folder
    on_disk = load_file(tmp_path / "export" / "model.safetensors").keys()
    assert any(".experts.3.w2." in key for key in on_disk) == (name == "mixtral")


def test_what_lies_beside_the_weights_leaves_the_model_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    hf = tiny("llama", vocab_size=300, eos_token_id=7)
    hf.config.use_cache = False
    files = export.companion_files(hf, tokenizer, dtype=torch.bfloat16)
    assert (hf.config.use_cache, hf.config.dtype, hf.config.eos_token_id) == (False, None, 7)
    config, generation = (json.loads(files[name]) for name in ("config.json", "generation_config.json"))
    assert (config["use_cache"], config["dtype"], config["eos_token_id"]) == (True, "bfloat16", 0)
    assert generation["eos_token_id"] == 0
    assert config["architectures"] == ["LlamaForCausalLM"]
    write_files(files, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_that_a_model_brings_comes_along(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "mine.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    spec = Pretrained(name_or_path=str(folder), trust_remote_code=True)
    hf = spec.build(param_dtype=torch.float32, device=torch.device("cpu"), seed=0).hf
    files = export.companion_files(hf, spec.tokenizer(None), dtype=None)
    assert files["mine.py"].decode() == REMOTE
    assert json.loads(files["config.json"])["auto_map"] == auto_map


# The card -------------------------------------------------------------------------------------------------------------


def card(progress: TrainState | None = None, parts: Any = lambda samples: {}, **changes: Any) -> str:
    config: dict[str, Any] = dict.fromkeys(("sequence_length", "batch_size", "gradient_accumulation_steps", "seed"), 2)
    config |= dict.fromkeys(("lr", "warmup_proportion", "weight_decay", "beta1", "beta2", "grad_clip"), 0.5)
    config |= {part: {"_target_": f"some.{part}"} for part in ("scheduler", "optimizer", "model")}
    config |= {"name": "a-name", "output_dir": "/home/anna/out", "model_name": "owner/model"}
    config |= {"dataset": {"source": "huggingface", "nameOrPath": "owner/texts"}}
    facts = {"parameters": 7, "precision": "32-true", "strategy": "ddp", "world_size": 3, "versions": {"torch": "2"}}
    data = {"documents": 1, "tokens": 2, "bytes": 3, "global_batch": 12}
    progress = progress or TrainState()
    return model_card(config | changes, progress, data=data, parts=parts, facts=facts, total_steps=9)


def front_matter(text: str) -> dict[str, Any]:
    matter: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return matter


def test_a_card_links_what_is_on_the_hub(tmp_path: Path) -> None:
    matter = front_matter(card())
    assert matter["base_model"] == "owner/model"
    assert matter["datasets"] == ["owner/texts"]
    local = {"source": "local", "nameOrPath": str(tmp_path)}
    matter = front_matter(card(model_name=str(tmp_path), dataset=local))
    assert not {"base_model", "datasets"} & matter.keys()
    matter = front_matter(card(model={"_target_": "pretrain.models.causal_lm.Scratch"}))
    assert "base_model" not in matter
    assert "from-scratch" in matter["tags"]


def test_a_card_has_no_secret_and_no_path_of_the_machine() -> None:
    dataset = {"source": "local", "nameOrPath": "/home/anna/books", "token": "hf_abc", "max_tokens": 5}
    dataset |= {"pattern": "https://anna:word@host/x"}
    text = card(dataset=dataset, model_name="~/models/one", extra=["/home/anna/a", {"api_key": "k-123"}])
    for hidden in ("anna", "hf_abc", "k-123", "~/models"):
        assert hidden not in text
    for shown in ("books", "one", "max_tokens: 5"):
        assert shown in text
    assert public({"tokenizer_name": "a", "hub_token": "b"}) == {"tokenizer_name": "a"}


def test_a_card_shows_numbers_that_are_none_as_none() -> None:
    score = {"domain": "a|b\nc", "role": "new", "loss": None, "perplexity": None, "bits_per_byte": None}
    text = card(TrainState(4, baseline={"a|b\nc": float("nan")}, scores=[score]))
    assert "| a\\|b c (new) | — → — | — | — → — | — → — |" in text
    assert "No text was scored" in card()


def test_a_card_shows_no_change_where_none_was_measured() -> None:
    score = {
        "domain": "old",
        "role": "base",
        "loss": 4.0,
        "perplexity": 54.598,
        "bits_per_byte": 1.5,
        "delta_loss": 0.0,
    }
    text = card(TrainState(5, evaluated_at=0, scores=[score]))
    assert "| old (base) | 4.0000 | — | 54.60 | 1.5000 |" in text
    assert "at step 0: the model before this run; it was not scored since." in text
    later = score | {"loss": 4.5, "perplexity": 90.017, "bits_per_byte": 1.6875, "delta_loss": 0.5}
    text = card(TrainState(9, evaluated_at=9, scores=[later, later | {"delta_loss": -1e-9}]))
    assert "| old (base) | 4.0000 → 4.5000 | +0.5000 | 54.60 → 90.02 | 1.5000 → 1.6875 |" in text
    assert "| +0.0000 |" in text
    unknown = later | {"delta_loss": None, "delta_reason": "step 0 was scored with other text"}
    text = card(TrainState(9, evaluated_at=9, scores=[unknown]))
    assert "| old (base) | — → 4.5000 | — | — → 90.02 | — → 1.6875 |" in text
    assert "Changes that are not known: old: step 0 was scored with other text." in text


def test_a_card_of_a_mixture_names_its_parts_and_what_was_read_of_them() -> None:
    parts = {
        "es": {"source": "huggingface", "nameOrPath": ["owner/es", "owner/texts"]},
        "more": {"source": "mixture", "parts": {"code": {"source": "local", "nameOrPath": "/home/anna/src"}}},
    }
    counts = {"es": PartCount(7500, 0.75, 0.7, 1.25), "more/code": PartCount(2500, 0.25, 0.3, 0.5)}
    text = card(
        TrainState(samples=40), parts=lambda n: counts if n == 40 else {}, dataset={"source": "mixture", "parts": parts}
    )
    assert "`owner/es`, `owner/texts` (huggingface), `src` (local): 1 documents" in text
    assert "datasets:\n- owner/es\n- owner/texts\n" in text
    assert "| es | 7,500 | 75.0% | 70.0% | 1.25 |" in text
    assert "| more/code | 2,500 | 25.0% | 30.0% | 0.50 |" in text
    assert "by the weights" not in card()
