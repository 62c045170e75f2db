"""What transforms do to a model: names, values, what is trained, and the weights that are exported."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pretrain.checkpoint.weights import check_transforms, saved_transforms
from pretrain.data.batch import Batch
from pretrain.models.causal_lm import Pretrained, Scratch
from pretrain.models.hub.export import save_full
from pretrain.models.model_factory import ModelFactory
from pretrain.models.transforms.apply import plain_model, weights_of
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import write_files
from tests.models.tiny import changed
from tests.transforms import Freeze, Lora, LoraLinear

CPU = torch.device("cpu")
IDS = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
BATCH = Batch(IDS[:, :-1], IDS[:, 1:], None, 32)
EVERY_LINEAR = Lora(targets=r"_proj$|lm_head$")


class Wrapped(nn.Module):
    """Another module around one that was there."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


class WrapEmbeddings:
    """Embedding and head get another name; where they are tied they stay so."""

    def apply(self, model):
        model.set_input_embeddings(Wrapped(model.get_input_embeddings()))
        model.lm_head = Wrapped(model.lm_head)

    def export(self, state):
        return {name.replace(".base.", "."): tensor for name, tensor in state.items()}


class Scale:
    """A new parameter of every block; its export multiplies it into a matrix."""

    def __init__(self, device="cpu"):
        self.device = device

    def apply(self, model):
        for layer in model.model.layers:
            layer.mlp.gain = nn.Parameter(torch.rand(1, device=self.device))
            layer.mlp.register_forward_hook(lambda module, args, output: output * module.gain)

    def export(self, state):
        kept = {n: t for n, t in state.items() if not n.endswith("mlp.gain")}
        for name in state:
            if name.endswith("mlp.gain"):
                kept[name.replace("gain", "down_proj.weight")] = (
                    state[name] * kept[name.replace("gain", "down_proj.weight")]
                )
        return kept


def factory_of(folder, *transforms, **more):
    return ModelFactory(Pretrained(name_or_path=str(folder)), torch.float32, 0, transforms, **more)


@pytest.mark.parametrize("shape", ["llama", "llama-tied"])
def test_a_wrapped_weight_is_read_under_its_name_in_the_files(exact_model, shape):
    plain = factory_of(exact_model(shape)).build(CPU).hf_state()
    for transforms in ([Lora()], [EVERY_LINEAR], [WrapEmbeddings()], [Scale(), WrapEmbeddings(), Lora()]):
        factory = factory_of(exact_model(shape), *transforms)
        built, meta = factory.build(CPU), factory.build_on_meta()
        files = factory.files(meta)
        state = built.hf_state()
        assert all(p.is_meta for p in meta.hf.parameters())
        assert files.keys() == state.keys() == meta.hf_state().keys()
        for name, tensor in state.items():
            assert torch.equal(files.read(name), tensor.detach()), name
            assert torch.equal(files.read(name, 1, 3), tensor.detach()[1:3]), name
            assert files.shape(name) == tuple(tensor.shape)
        trained = {name for name, p in built.hf_named_parameters() if p.requires_grad}
        assert trained == {name for name, p in meta.hf_named_parameters() if p.requires_grad}
        names = built.transformed.names
        assert {names[name] for name in names} == plain.keys()
        assert all(torch.equal(plain[names[name]], state[name]) for name in names)


def test_new_weights_are_the_same_wherever_the_model_is_built_and_nobody_else_draws_other_numbers(exact_model):
    def draws():
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    folder = exact_model("llama")  # it is made here, which draws numbers, if no test before has asked for it
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = draws()
    values = []
    for other in (7, 8):
        torch.manual_seed(other), random.seed(7), np.random.seed(7)
        values.append(factory_of(folder, Lora()).build(CPU).hf_state()["model.layers.1.self_attn.q_proj.a"])
        if other == 7:
            assert draws() == expected
    assert torch.equal(*values)
    assert len(torch.unique(values[0])) == values[0].numel()
    another = ModelFactory(Pretrained(name_or_path=str(exact_model("llama"))), torch.float32, 1, (Lora(),)).build(CPU)
    assert not torch.equal(values[0], another.hf_state()["model.layers.1.self_attn.q_proj.a"])


def test_transforms_are_applied_in_order(exact_model):
    head_first = factory_of(exact_model("llama"), Freeze("lm_head"), Lora()).build(CPU)
    assert {n.rpartition(".")[2] for n, p in head_first.hf_named_parameters() if p.requires_grad} == {"a", "b"}
    renamed = factory_of(exact_model("llama"), Lora(), Freeze(r"q_proj\.a$")).build(CPU)
    assert not renamed.hf.model.layers[0].self_attn.q_proj.a.requires_grad
    assert renamed.hf.model.layers[0].self_attn.v_proj.a.requires_grad


def test_a_new_weight_without_values_is_refused(exact_model):
    factory = factory_of(exact_model("llama"), Scale(device="meta"))
    for build in (factory.build_on_meta, lambda: factory.build(CPU)):
        with pytest.raises(UserError, match=r"Scale: its new weight model\.layers\.0\.mlp\.gain is on the meta device"):
            build()


@pytest.mark.parametrize("shape", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "transforms",
    [[Lora()], [Scale(), Lora(targets="o_proj$")], [WrapEmbeddings(), Freeze("embed")]],
    ids=["lora", "scale-lora", "wrap-freeze"],
)
def test_from_pretrained_reads_the_trained_model(exact_model, tmp_path, shape, transforms):
    model = changed(factory_of(exact_model(shape), *transforms).build(CPU), by=0.1)
    weights = {name: tensor.detach() for name, tensor in model.hf_state().items()}
    plain = plain_model(model.hf)
    save_full(plain, model.transformed.export(plain, weights), tmp_path, shard_size="5GB")
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        difference = (read(IDS).logits - model.hf(IDS).logits).abs().max()
        before = (read(IDS).logits - factory_of(exact_model(shape)).build(CPU).eval().hf(IDS).logits).abs().max()
    assert difference < 1e-5 < 1e-2 < before


def test_an_export_that_the_plain_architecture_can_not_read_is_refused(exact_model):
    model = factory_of(exact_model("llama-tied"), Lora()).build(CPU)
    state, plain = model.hf_state(), plain_model(model.hf)
    with pytest.raises(
        UserError, match=r"weights of LlamaForCausalLM: model.layers.0.self_attn.q_proj.weight is missing, and"
    ):
        type(model.transformed)((Freeze("x"),), None, {}, {}, {}, {}).export(plain, state)
    cut = type("Cut", (Freeze,), {"export": lambda self, s: {n: t[:1] for n, t in Lora().export(s).items()}})("x")
    with pytest.raises(UserError, match=r"model.embed_tokens.weight is \[1, 32\] instead of \[300, 32\]"):
        type(model.transformed)((cut,), None, {}, {}, {}, {}).export(plain, state)


def test_a_head_that_a_transform_has_changed_computes_its_own_logits(exact_model):
    """At the start it is equal to its matrix, so running it could not show that."""
    plain, model = (factory_of(exact_model("llama"), *t).build(CPU) for t in ([], [Lora(targets="lm_head$")]))
    assert (plain.fused_loss, model.fused_loss) == (True, False)
    losses = [m(BATCH.input_ids, BATCH.labels) for m in (plain, model)]
    torch.testing.assert_close(*losses)
    hooked = plain.hf
    hooked.lm_head.register_forward_hook(lambda module, args, output: output)
    plain.probe()
    assert not plain.fused_loss
    assert model.document_mask is not None
    wrapped = factory_of(exact_model("llama"), WrapEmbeddings()).build(CPU)
    packed = torch.arange(8).repeat(2, 2)
    torch.testing.assert_close(
        wrapped(BATCH.input_ids, BATCH.labels, packed), plain(BATCH.input_ids, BATCH.labels, packed)
    )


@pytest.mark.parametrize("shape", ["llama", "llama-tied"])
def test_weights_of_a_checkpoint_are_read_under_their_own_names(exact_model, tmp_path, shape):
    from safetensors.torch import save_file

    transforms = [WrapEmbeddings(), Lora()]
    trained = changed(factory_of(exact_model(shape), *transforms).build(CPU), by=0.1)
    save_file({n: t.detach().clone() for n, t in trained.hf_state().items()}, tmp_path / "model.safetensors")
    write_files({"config.json": (exact_model(shape) / "config.json").read_bytes()}, tmp_path)
    factory = factory_of(tmp_path, *transforms, has_transformed_weights=True)
    read = factory.build(CPU)
    assert not any(t.is_meta for t in (*read.parameters(), *read.buffers()))
    assert weights_of(read.hf).keys() == trained.hf_state().keys()
    assert all(torch.equal(t, trained.hf_state()[n]) for n, t in read.hf_state().items())
    assert {n for n, p in read.hf_named_parameters() if p.requires_grad} == {
        n for n, p in trained.hf_named_parameters() if p.requires_grad
    }
    assert read.training
    assert read.document_mask is not None
    with torch.no_grad():
        assert torch.equal(read.eval().hf(IDS).logits, trained.hf(IDS).logits)
    assert factory.files(factory.build_on_meta()).keys() == trained.hf_state().keys()


def test_random_weights(exact_model, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    spec = Scratch(
        name_or_path=str(tmp_path),
        overrides={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1}
        | {"intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 300},
    )
    plain, model = (ModelFactory(spec, torch.float32, 3, t).build(CPU) for t in ((), (Lora(),)))
    assert isinstance(model.hf.model.layers[0].self_attn.q_proj, LoraLinear)
    names = model.transformed.names
    assert all(torch.equal(plain.hf_state()[names[n]], t) for n, t in model.hf_state().items() if n in names)
    factory = ModelFactory(spec, torch.float32, 3, (Lora(),))
    assert factory.files(factory.build_on_meta()) is None


def test_the_gradient_with_checkpointed_activations_is_the_same(exact_model):
    gradients = []
    for checkpointing in (False, True):
        spec = Pretrained(name_or_path=str(exact_model("llama")), gradient_checkpointing=checkpointing)
        model = ModelFactory(spec, torch.float32, 0, (Lora(),)).build(CPU)
        model(BATCH.input_ids, BATCH.labels).backward()
        gradients.append({n: p.grad for n, p in model.hf_named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 3 * 2 * 2
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-6) for n in gradients[0])
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3


@pytest.mark.parametrize("transforms", ['["x"]', '"x"', "[1]", "{}"])
def test_a_damaged_list_of_transforms_is_none(tmp_path, transforms):
    (tmp_path / "state.json").write_text(f'{{"identity": {{"transforms": {transforms}}}}}')
    assert saved_transforms(tmp_path) == []
    assert check_transforms(tmp_path, [], name="x") is False
