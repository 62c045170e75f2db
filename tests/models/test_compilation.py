"""The blocks of a model are compiled once for all of them; that they compute the same is the tests' of strategies, too."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pretrain.models import compilation, language_model, torch_internals
from pretrain.models.blocks import find_blocks
from pretrain.models.causal_lm import Pretrained
from pretrain.models.language_model import LanguageModel
from pretrain.runtime import folders
from pretrain.runtime.errors import UserError
from tests.models import architectures
from tests.models.tiny import tiny

# The routing of these two reads from the device how many tokens each expert gets.
DEPEND_ON_DATA = {"jetmoe", "longcat_flash"}
IDS = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(0))
PACKED = torch.arange(16).remainder(5).expand(2, -1).contiguous()

Graphs = list[torch.fx.GraphModule]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """What the compiler is given; it is run as it is, so no C++ compiler is needed."""
    found: Graphs = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    monkeypatch.setattr(compilation, "before_first_compilation", lambda: None)  # that is for the C++ compiler
    monkeypatch.setattr(language_model, "before_first_compilation", lambda: None)
    clear()
    yield found
    clear()


def clear() -> None:
    torch._dynamo.reset()
    counters.clear()
    compilation.compiled.cache_clear()


def layers(name: str, count: int) -> Any:
    return tiny(name, num_hidden_layers=count)


def passed(model: LanguageModel, positions: torch.Tensor | None = None, rows: int = 2) -> float:
    given = None if positions is None else positions[:rows]
    loss = model(IDS[:rows, :-1].contiguous(), IDS[:rows, 1:].contiguous(), given)
    if torch.is_grad_enabled():
        loss.backward()
    return loss.item()


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_all_blocks_share_one_compilation(name: str, graphs: Graphs) -> None:
    """One for five blocks and one for the loss; documents add another of the blocks."""
    hf = layers(name, 5)
    want, wanted = (passed(LanguageModel(hf), positions) for positions in (None, PACKED))
    model = LanguageModel(hf, compile=True)
    assert passed(model) == pytest.approx(want, rel=1e-5)
    assert len(graphs) == 2
    assert passed(model, PACKED) == pytest.approx(wanted, rel=1e-5)
    assert len(graphs) == 3
    assert not counters["graph_break"]


def test_kinds_of_blocks_are_compiled_apart(graphs: Graphs) -> None:
    kinds = ["conv", "full_attention"] * 2
    passed(LanguageModel(architectures.tiny("lfm2", num_hidden_layers=4, layer_types=kinds), compile="blocks"))
    assert len(graphs) == 3  # of which one is the loss


def test_activation_checkpointing_is_inside_of_what_is_compiled(graphs: Graphs) -> None:
    hf = layers("llama", 3)
    want = passed(LanguageModel(hf))
    hf.activation_checkpointing_enable({"use_reentrant": False})
    assert passed(LanguageModel(hf, compile=True)) == pytest.approx(want, rel=1e-5)
    assert len(graphs) == 2
    assert any("checkpoint" in str(node.target) for node in graphs[0].graph.nodes)


def test_one_compilation_for_all_chunks_of_the_loss(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = layers("llama", 2)
    want = passed(LanguageModel(hf))
    monkeypatch.setattr("pretrain.models.loss.CHUNK_LOGITS", 8 * 97)
    model = LanguageModel(hf, compile=True)
    assert passed(model) == pytest.approx(want, rel=1e-5)
    assert len(graphs) == 2
    sizes = [node.meta["example_value"].shape for node in graphs[1].graph.nodes if node.op == "placeholder"]
    assert sizes[0] == (8, 32)


def test_evaluation_compiles_nothing(graphs: Graphs) -> None:
    model = LanguageModel(layers("llama", 2), compile=True)
    passed(model)
    model.eval()
    eager = LanguageModel(layers("llama", 2)).eval()
    with torch.no_grad():
        for rows in (1, 2):
            assert passed(model, rows=rows) == passed(eager, rows=rows)
        ends = torch.tensor([3, 5])
        assert torch.equal(model(IDS[:, :-1], ends=ends), eager(IDS[:, :-1], ends=ends))
    assert len(graphs) == 2


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="no vector instructions that torch tests")
def test_one_set_of_vector_instructions_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest one, which is the one that torch uses; all of them if it does not work."""
    from torch._inductor import config, cpu_vec_isa

    tried: list[str] = []
    works: list[str] = []

    def check_build(self: Any, code: str) -> bool:
        if code == cpu_vec_isa.VecISA._avx_code:  # the others are short ones, of single instructions
            tried.append(str(self))
        return not works or str(self) in works

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", "avx512", "avx512_vnni"])

    def forget() -> None:
        for cached in (
            cpu_vec_isa.VecISA._VecISA__bool__impl,  # type: ignore[attr-defined]
            cpu_vec_isa.valid_vec_isa_list,
            *(kind.__bool__ for kind in map(type, cpu_vec_isa.supported_vec_isa_list)),
        ):
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()

    def picked() -> str:
        monkeypatch.setattr(config.cpp, "vec_isa_ok", None)
        forget()
        tried.clear()
        torch_internals.try_one_vector_set()
        return str(cpu_vec_isa.pick_vec_isa())

    try:
        widest = picked()
        assert tried == [widest] == ["avx512 avx512_vnni"]
        works.append("avx2")
        assert picked() == "avx2"
        assert set(tried) == {"avx512 avx512_vnni", "avx512", "avx2"}
        assert config.cpp.vec_isa_ok is None
    finally:
        forget()


def test_names_of_weights_stay(graphs: Graphs) -> None:
    assert LanguageModel(tiny("gpt2"), compile=True).hf_state().keys() == LanguageModel(tiny("gpt2")).hf_state().keys()


def test_graph_is_one_for_the_whole_model(graphs: Graphs) -> None:
    passed(LanguageModel(layers("llama", 1), compile="graph"))
    assert len(graphs) == 1


def test_a_model_without_declared_blocks_is_one_graph(graphs: Graphs, capsys: pytest.CaptureFixture[str]) -> None:
    hf = architectures.tiny("openai-gpt")
    assert not find_blocks(hf)
    passed(LanguageModel(hf, compile=True))
    assert len(graphs) == 1
    assert "model.compile: OpenAIGPTLMHeadModel does not declare its blocks" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.NAMES)
def test_no_block_of_any_architecture_breaks_the_graph(name: str, graphs: Graphs) -> None:
    hf = architectures.tiny(name)
    blocks = find_blocks(hf)
    if not blocks or name == "reformer":  # its training needs rows of one length
        pytest.skip("compiled as one graph")
    try:
        model = LanguageModel(hf)
    except UserError:
        pytest.skip("not a causal model")
    want = passed(model)
    assert passed(LanguageModel(hf, compile=True)) == pytest.approx(want, rel=1e-5)
    assert bool(counters["graph_break"]) == (name in DEPEND_ON_DATA)
    if name not in DEPEND_ON_DATA:
        assert len(graphs) <= len(blocks) + 1


# -- the folder of compiled code ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(compilation.CACHE_VARIABLE, "")
    return tmp_path / "cache" / f"compiled-{os.geteuid()}"


def test_compiled_code_is_kept_where_only_this_user_writes(cache: Path) -> None:
    compilation.keep_compiled_code()
    assert os.environ[compilation.CACHE_VARIABLE] == str(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.chmod(0o770)
    compilation.keep_compiled_code()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_folder_of_the_environment_is_respected(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compilation.CACHE_VARIABLE, str(tmp_path / "mine"))
    compilation.keep_compiled_code()
    assert os.environ[compilation.CACHE_VARIABLE] == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    assert not cache.exists()


def test_a_planted_link_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match=rf"PRETRAIN_CACHE: {cache} is a link; remove it"):
        compilation.keep_compiled_code()
    assert not os.environ[compilation.CACHE_VARIABLE]


@pytest.fixture
def entered() -> Iterator[Path]:
    """A folder that other users can enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_that_others_could_exchange(
    entered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sticky bit prevents it, and so does a parent that they can't enter."""
    monkeypatch.setattr(folders, "_is_own_group", lambda gid: False)
    cache, home, variable = entered / "inner/cache", entered / "home", compilation.CACHE_VARIABLE
    cache.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PRETRAIN_CACHE", str(cache))
    monkeypatch.setenv(variable, "")
    for above, mode, is_kept in (
        (0o755, 0o1775, True),
        (0o755, 0o775, False),
        (0o755, 0o755, True),
        (0o700, 0o775, True),
    ):
        cache.chmod(mode)
        cache.parent.chmod(above)
        compilation._say_elsewhere.cache_clear()
        compilation.keep_compiled_code()
        kept = (cache if is_kept else home / ".cache/pretrain") / f"compiled-{os.geteuid()}"
        assert os.environ[variable] == str(kept), oct(mode)
        assert ("compiled code is kept in" in capsys.readouterr().err) == (not is_kept)
    cache.parent.chmod(0o755)
    monkeypatch.setenv(variable, str(cache / "mine"))
    with pytest.raises(UserError, match=rf"{variable}: .*mine can be exchanged by others, who can write in {cache} "):
        compilation.keep_compiled_code()


def test_flex_attention_keeps_its_code_in_that_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Pretrained(name_or_path="sample", attention="flex_attention")
    spec.finish(tiny("llama"), None, lambda hf: hf)
    assert os.environ[compilation.CACHE_VARIABLE] == str(cache)


def test_a_link_of_the_environment_is_followed_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "disk")
    monkeypatch.setenv(compilation.CACHE_VARIABLE, str(tmp_path / "mine"))
    compilation.keep_compiled_code()
    assert os.environ[compilation.CACHE_VARIABLE] == str(tmp_path / "disk")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's code is compiled otherwise")
def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compilation.check_compiler()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(UserError, match="there is no /no/such/compiler; install one"):
        compilation.check_compiler()


@pytest.mark.parametrize("named", [False, True])
def test_no_code_of_another_user_is_run(
    named: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, key = (tmp_path / "theirs", compilation.CACHE_VARIABLE) if named else (cache, "PRETRAIN_CACHE")
    folder.mkdir(parents=True)
    if named:
        monkeypatch.setenv(compilation.CACHE_VARIABLE, str(folder))
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UserError, match=f"{key}.*belongs to another user"):
        compilation.keep_compiled_code()
    monkeypatch.setenv("PRETRAIN_SHARED_FOLDERS", "1")
    if os.geteuid() == 0:
        compilation.keep_compiled_code()
