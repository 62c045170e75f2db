"""``transform=[vocabulary]``: more merges of a tokenizer, and rows for them."""

import json
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from pretrain.config.compose import run_config
from pretrain.models.bpe import train_bpe
from pretrain.models.continued_bpe import learn, merged, merges, with_merges
from pretrain.models.grown_tokenizer import fertility, grown, new_tokens
from pretrain.models.transforms.apply import apply_transforms
from pretrain.models.transforms.vocabulary import GrowRows, Vocabulary
from pretrain.runtime.errors import UserError
from tests.models.tiny import check_what_a_shard_reads, tiny

CPU = torch.device("cpu")
WORDS = "kubernetes cluster deployment namespace container ingress controller replica manifest".split()


def documents(seed=0, count=60):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=20)) for _ in range(count)]


def by_hand(words, counts, size):
    """The merges of the textbook: count all pairs again after every merge."""
    words, found = [list(word) for word in words], []
    while len(found) < size:
        total = {}
        for word, count in zip(words, counts, strict=True):
            for pair in pairwise(word):
                total[pair] = total.get(pair, 0) + count
        known = {"".join(pair) for pair in found}
        total = {pair: n for pair, n in total.items() if "".join(pair) not in known and n > 1}
        if not total:
            break
        found.append(min(total, key=lambda pair: (-total[pair], pair)))
        words = [merged(word, found[-1]) for word in words]
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=12), st.integers(1, 4)), min_size=1, max_size=12))
def test_the_merges_are_those_of_the_textbook(counted):
    words, counts = [list(word) for word, _ in counted], [count for _, count in counted]
    assert merges([list(w) for w in words], counts, 8, known="abc") == by_hand(words, counts, 8)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter(["the sea road of stone a ship and its crew went under light rain"] * 3), vocab_size=280)


def test_text_is_encoded_as_it_was_learned(bpe):
    old = bpe.backend_tokenizer
    pairs = learn(old, documents(), 40)
    assert len(pairs) == 40
    state = json.loads(old.to_str())
    first = len(bpe)
    new = Tokenizer.from_str(json.dumps(with_merges(state, pairs, first=first)))
    assert new.get_vocab_size() == first + 40
    for text in [*documents(1, 5), "the sea and the kubernetes", "Straße 🙂\n  x"]:
        ids = new.encode(text).ids
        assert new.decode(ids) == text
        assert len(ids) <= len(old.encode(text).ids)
        tokens = old.encode(text).tokens
        for pair in pairs:  # words never join, because no pair has a space inside
            tokens = merged(tokens, pair)
        assert tokens == new.encode(text).tokens
    old_text = "the sea road of stone"
    assert new.encode(old_text).ids[:4] == old.encode(old_text).ids[:4]


def test_pieces_of_a_token_are_the_old_tokens(bpe):
    new, pieces = grown(bpe, size=30, tokens=None, texts=lambda: iter(documents()), name="x")
    assert [*pieces] == [*range(len(bpe), len(bpe) + 30)]
    for token, old in pieces.items():
        assert bpe.decode([*old]) == new.decode([token])
        assert max(old) < len(bpe)
    given, pieces = grown(bpe, size=None, tokens=["kubectl", "ночь"], texts=None, name="x")
    assert given.encode("run kubectl", add_special_tokens=False)[-1] == len(bpe)
    assert [bpe.decode([*old]) for old in pieces.values()] == ["kubectl", "ночь"]


def test_it_is_saved_with_its_new_tokens(bpe, tmp_path, exact_model):
    from pretrain.models.tokenizer import folder_tokenizer

    folder = folder_tokenizer(exact_model("llama"))
    new, pieces = grown(folder, size=20, tokens=None, texts=lambda: iter(documents()), name="x")
    new.save_pretrained(tmp_path)
    assert new_tokens(tmp_path / "new_tokens.json") == [*pieces]
    text = documents(2, 1)[0]
    for read in (AutoTokenizer.from_pretrained(tmp_path), folder_tokenizer(tmp_path)):
        assert read(text)["input_ids"] == new(text)["input_ids"]
        assert (read.eos_token, read.bos_token) == (folder.eos_token, folder.bos_token)
    (tmp_path / "new_tokens.json").write_text("{}")
    with pytest.raises(UserError, match="does not list the new tokens"):
        new_tokens(tmp_path / "new_tokens.json")


def test_a_tokenizer_that_splits_no_words():
    """As that of Llama 2, whose words begin with ▁."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    backend.train_from_iterator(["abcdefghijklmnopqrstuvwxyz ▁"], trainers.BpeTrainer(vocab_size=30))
    pairs = learn(backend, documents(), 50)
    assert all("▁" not in (a + b)[1:] for a, b in pairs)
    assert "▁kubernetes" in {a + b for a, b in pairs}


def test_word_pieces_can_not_grow(bpe):
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    from transformers import PreTrainedTokenizerFast

    pieces = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(
        UserError, match="the tokenizer of bert is a WordPiece model, to which no merges can be added; give the"
    ):
        grown(pieces, size=5, tokens=None, texts=lambda: iter(documents()), name="bert")
    assert [*grown(pieces, size=None, tokens=["kubectl"], texts=None, name="bert")[1]] == [2]
    with pytest.raises(UserError, match="the tokenizer of x has 'the' already"):
        grown(bpe, size=None, tokens=["kubectl", "the"], texts=None, name="x")
    with pytest.raises(UserError, match="no new token was found"):
        grown(bpe, size=5, tokens=None, texts=lambda: iter(["a b c"]), name="x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "transform.vocabulary: set one of size"),
        (["size=8", "tokens=[a]"], "transform.vocabulary: set one of size"),
        (["size=0"], "transform.vocabulary.size=0: input should be greater than 0"),
        (["tokens=[a,' ']"], "transform.vocabulary.tokens: ' ' is empty or given twice"),
        (["size=8", "thaw_at=0.5"], "transform.vocabulary.thaw_at: only with only_new_rows=true"),
        (["size=8", "start=median"], "transform.vocabulary.start='median': input should be 'mean'"),
    ],
)
def test_mistakes_before_torch_is_needed(words, message):
    with pytest.raises(UserError, match=message):
        run_config(["transform=[vocabulary]", *(f"transform.vocabulary.{word}" for word in words)])


def test_fertility():
    old = train_bpe(iter(["ab"]), vocab_size=257)
    new, _ = grown(old, size=None, tokens=["ab"], texts=None, name="x")
    assert fertility(["ab ab c"], old, new) == "2.33 → 1.67 tokens a word, 1.000 → 0.714 a byte (28.6% fewer)"


# -- rows ---------------------------------------------------------------------------------------------------------------------

PIECES = {97: (1, 2), 98: (3,), 99: (4, 5, 6)}


def grow(shape, **more):
    model, before = tiny(shape), tiny(shape)
    settings = Vocabulary(size=3, **more)
    transformed = apply_transforms([GrowRows(settings, PIECES, 100)], model, seed=0)
    return model, before, transformed


@pytest.mark.parametrize("shape", ["llama", "llama-tied-biased", "gpt2", "phi", "gemma2", "opt"])
def test_rows_of_embedding_and_head(shape):
    model, before, _ = grow(shape)
    assert model.config.vocab_size == 128
    for get in ("get_input_embeddings", "get_output_embeddings"):
        new, old = getattr(model, get)(), getattr(before, get)()
        assert new.weight.shape[0] == 128
        assert torch.equal(new.weight[:97], old.weight)
        for token, pieces in PIECES.items():
            torch.testing.assert_close(new.weight[token], old.weight[list(pieces)].mean(0))
        torch.testing.assert_close(new.weight[100:], old.weight.mean(0).expand(28, -1))
    tied = before.get_output_embeddings().weight is before.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    ids = torch.tensor([[1, 97, 99]])
    with torch.no_grad():
        logits = model.eval()(ids[:, :1]).logits
        assert logits.shape[-1] == 128
        torch.testing.assert_close(logits[..., :97], before.eval()(ids[:, :1]).logits)
        torch.testing.assert_close(logits[..., 98], logits[..., 3])


def test_other_starts():
    old = tiny("llama").get_input_embeddings().weight
    drawn = grow("llama", start="distribution")[0].get_input_embeddings().weight
    again = grow("llama", start="distribution")[0].get_input_embeddings().weight
    assert torch.equal(drawn, again)
    assert 0.5 < drawn[97:100].std() / old.std() < 2
    assert len(torch.unique(drawn[97:100])) == 96
    assert not torch.equal(drawn[97:100], grow("llama", start="random")[0].get_input_embeddings().weight[97:100])
    assert len(grow("llama", multiple_of=1)[0].get_input_embeddings().weight) == 100


@pytest.mark.parametrize("start", ["mean", "distribution", "random"])
@pytest.mark.parametrize("shape", ["llama", "llama-tied", "gpt2"])
def test_a_shard_reads_the_same_values_that_a_full_model_has(exact_model, shape, start):
    rows = GrowRows(Vocabulary(size=3, start=start), {300: (1, 2), 301: (9,), 310: (4,)}, 311)
    check_what_a_shard_reads(exact_model(shape), rows, rows=((0, None), (1, 3), (290, 320), (305, 320)))


def test_only_new_rows_are_trained():
    model, _, transformed = grow("llama", only_new_rows=True)
    both = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == both
    assert transformed.first_rows == dict.fromkeys(both, (97, None))
    model, _, transformed = grow("llama-tied-biased", only_new_rows=True, thaw_at=0.25)
    assert transformed.first_rows == {"model.embed_tokens.weight": (97, 0.25)}
    assert all(p.requires_grad for p in model.parameters())
    assert set(transformed.thaw_at.values()) == {0.25}


def test_a_tokenizer_smaller_than_the_embedding_uses_its_free_rows():
    model, before = tiny("llama"), tiny("llama")
    apply_transforms([GrowRows(Vocabulary(size=2), {90: (1,), 91: (2,)}, 92)], model, seed=0)
    new, old = model.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert len(new) == 128
    assert torch.equal(new[90:92], old[1:3])
    assert torch.equal(new[92:97], old[92:97])


def test_a_plan_counts_the_rows_without_a_tokenizer():
    model = tiny("llama")
    apply_transforms([Vocabulary(size=40)], model, seed=0)
    assert len(model.get_input_embeddings().weight) == 192
