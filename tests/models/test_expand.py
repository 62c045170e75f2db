"""``transform=[expand]``: more blocks that change nothing at the start, in files that plain transformers reads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pretrain.models.causal_lm import Pretrained
from pretrain.models.hub.export import companion_files, save_full
from pretrain.models.transforms.apply import apply_transforms, plain_model, weights_of
from pretrain.models.transforms.expand import Expand, spread
from pretrain.runtime.errors import UserError
from tests.models.tiny import CONFIGS, check_what_a_shard_reads, tiny

CPU = torch.device("cpu")
IDS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 80).flatmap(lambda old: st.tuples(st.just(old), st.integers(1, old))))
def test_copies_are_spread_evenly_behind_their_originals(numbers):
    old, new = numbers
    origin = spread(old, new)
    assert len(origin) == old + new
    assert sorted(set(origin)) == [*range(old)]
    assert origin == sorted(origin)
    copied = [i for i in range(old) if origin.count(i) == 2]
    gaps = [b - a for a, b in zip([-1, *copied], copied, strict=False)]
    assert copied[-1] == old - 1
    assert max(gaps) - min(gaps) <= 1


def test_where_the_paper_puts_them():
    assert spread(4, 2) == [0, 1, 1, 2, 3, 3]
    assert spread(32, 8)[:10] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]


@pytest.mark.parametrize("shape", CONFIGS)
def test_a_step_0_model_is_the_same_to_the_last_bit_and_a_trained_one_is_read_by_transformers(shape, tmp_path):
    model, before = tiny(shape).eval(), tiny(shape).eval()
    old = {id(p) for p in model.parameters()}
    transformed = apply_transforms([Expand(blocks=1)], model, seed=0)
    number = before.config.get_text_config().num_hidden_layers
    assert model.config.get_text_config().num_hidden_layers == number + 1
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before(IDS).logits)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in model.named_parameters() if id(p) not in old}
        assert {n.split(f".{number}.")[0] for n in trained} == {next(iter(trained)).split(f".{number}.")[0]}
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        logits = model(IDS).logits
        assert (logits - before(IDS).logits).abs().max() > 1e-3
        plain = plain_model(model)
        state = {n: t.detach().clone() for n, t in weights_of(model).items()}
        save_full(plain, transformed.export(plain, state), tmp_path, shard_size="5GB")
        read, info = AutoModelForCausalLM.from_pretrained(
            tmp_path,
            output_loading_info=True,
            dtype=torch.float32,
            attn_implementation=model.config._attn_implementation,
        )
        assert not info["missing_keys"] | info["unexpected_keys"]
        torch.testing.assert_close(read.eval()(IDS).logits, logits, rtol=1e-5, atol=1e-6)


def test_the_gradient_reaches_the_new_blocks():
    model = tiny("llama")
    apply_transforms([Expand(blocks=2)], model, seed=0)
    model(IDS, labels=IDS).loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {
        f"model.layers.{j}.{part}.weight" for j in (1, 3) for part in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_all_blocks_can_be_trained_and_share_the_config():
    model = tiny("llama")
    apply_transforms([Expand(blocks=1, freeze_old=False)], model, seed=0)
    assert all(p.requires_grad for p in model.parameters())
    configs = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    assert configs == {id(model.config)}
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


@pytest.mark.parametrize("shape", ["llama-tied", "gpt2"])
def test_a_shard_reads_the_same_values_that_a_full_model_has(exact_model, shape):
    check_what_a_shard_reads(exact_model(shape), Expand(blocks=2))


def test_values_of_the_config_by_block_grow_with_the_blocks():
    model = tiny("gemma2")
    types = model.config.layer_types
    assert len(set(types)) == 2
    apply_transforms([Expand(blocks=2)], model, seed=0)
    assert model.config.layer_types == [types[0], types[0], types[1], types[1]]


@pytest.mark.parametrize(
    ("shape", "expand", "changes", "message"),
    [
        ("llama", Expand(blocks=3), {}, "transform.expand.blocks=3: the model has 2 blocks; at most one copy of each"),
        ("gpt2", Expand(), {"scale_attn_by_inverse_layer_idx": True}, "a block computes by its number"),
        (
            "llama",
            Expand(outputs="c_proj"),
            {},
            r"outputs='c_proj': name the layers .* there is input_layernorm, mlp.down_proj",
        ),
    ],
)
def test_what_can_not_be_meant(shape, expand, changes, message):
    with pytest.raises(UserError, match=message):
        apply_transforms([expand], tiny(shape, **changes), seed=0)


def test_blocks_of_different_kinds_are_moved_with_their_kind():
    """As a mixture of experts whose first blocks are dense."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="block 1 of DeepseekV3ForCausalLM would have other weights than block 0"):
        apply_transforms([Expand(blocks=3)], model, seed=0)


def test_the_companions_of_an_export_have_the_new_number(tiny_model):
    hf = Pretrained(name_or_path=str(tiny_model)).build(param_dtype=torch.float32, device=CPU, seed=0).hf
    number = hf.config.num_hidden_layers
    apply_transforms([Expand(blocks=1)], hf, seed=0)
    from transformers import AutoTokenizer

    files = companion_files(plain_model(hf), AutoTokenizer.from_pretrained(tiny_model), dtype=torch.float32)
    assert f'"num_hidden_layers": {number + 1}' in files["config.json"].decode()
