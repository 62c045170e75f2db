"""Private parts of other libraries are used in a few small modules alone, and are what these modules take them for."""

import ast
import inspect
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pretrain

PACKAGE = Path(pretrain.__file__).parent
# The modules that use private parts of a library; each names the versions in which they were seen.
INTERNALS = {
    "config/hydra_internals.py": "hydra-core",
    "config/interpolation.py": "omegaconf",
    "data/sources/datasets_internals.py": "``datasets``",
    "launch/rendezvous_pickle.py": "torch",
    "launch/torch_agent.py": "torch",
    "models/torch_internals.py": "torch",
    "models/transformers_internals.py": "transformers",
    "plan/compiler_internals.py": "torch",
    "plan/torch_internals.py": "torch",
    "strategy/deepspeed_internals.py": "DeepSpeed",
    "strategy/loss_scaler.py": "torch",
    "strategy/zero_internals.py": "DeepSpeed",
    "sweep/optuna_internals.py": "Optuna",
}
DOCUMENTED = {"os._exit", "sys._current_frames"}  # by Python, in spite of the name
SETTINGS = ("torch.backends.",)  # module attributes that are there to be set
ACCESS = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name):
    return name.startswith("_") and not name.endswith("_")


def is_foreign(module):
    top = module.partition(".")[0]
    return top != "pretrain" and top not in sys.stdlib_module_names


def names_defined_in(tree):
    """The private names of functions, classes, variables and attributes that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def foreign_private(source, own):
    """What a module uses or replaces of other libraries: private imports, private attributes, monkeypatches. ``own``: the
    private names that the package itself defines."""
    tree = ast.parse(source)
    foreign = set()  # the names of what is imported from other libraries
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(a.asname or a.name.partition(".")[0], a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(a.asname or a.name, f"{node.module}.{a.name}") for a in node.names]
        else:
            continue
        for name, path in names:
            if is_foreign(path):
                foreign.add(name)
                if any(map(is_private, path.split("."))):
                    yield path
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            path = ast.unparse(node)
            if path not in DOCUMENTED and (node.attr not in own or path.startswith("super()")):
                yield path
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            for path in map(ast.unparse, targets):
                root = path.removeprefix("vars(").partition(".")[0].partition("[")[0].partition(")")[0]
                if root in foreign and root != path and not path.startswith(SETTINGS):
                    yield f"{path} = …"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ACCESS and len(node.args) > 1:
            on, name = node.args[0], node.args[1]
            private = isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own
            patched = ast.unparse(node.func) in ("setattr", "delattr") and ast.unparse(on).partition(".")[0] in foreign
            if private or patched:
                yield ast.unparse(node)


def own_names(files):
    return {name for file in files for name in names_defined_in(ast.parse(file.read_text())) if is_private(name)}


def test_no_other_module_uses_private_parts_of_a_library():
    files = {str(file.relative_to(PACKAGE)): file for file in sorted(PACKAGE.rglob("*.py"))}
    own = own_names(file for name, file in files.items() if name not in INTERNALS)
    found = {name: list(foreign_private(file.read_text(), own)) for name, file in files.items()}
    assert {name: uses for name, uses in found.items() if uses and name not in INTERNALS} == {}
    assert [name for name in INTERNALS if not found[name] and name != "strategy/deepspeed_internals.py"] == []


@pytest.mark.parametrize("name", INTERNALS)
def test_the_versions_are_named(name):
    docstring = ast.get_docstring(ast.parse((PACKAGE / name).read_text()))
    assert INTERNALS[name] in docstring
    assert "seen in " in docstring
    assert len((PACKAGE / name).read_text().splitlines()) <= 120, "a small module"


@pytest.mark.parametrize(
    ("line", "uses"),
    [
        ("from hydra._internal.hydra import Hydra", ["hydra._internal.hydra.Hydra"]),
        ("from torch.distributed import _functional", ["torch.distributed._functional"]),
        ("scaler._scale", ["scaler._scale"]),
        ("super()._own()", ["super()._own"]),
        ("getattr(model, '_no_split_modules')", ["getattr(model, '_no_split_modules')"]),
        ("from torch import nn\nnn.Module.forward = f", ["nn.Module.forward = …"]),
        ("from transformers import masking_utils\nvars(masking_utils)['f'] = f", ["vars(masking_utils)['f'] = …"]),
        (
            "from transformers import masking_utils\nsetattr(masking_utils, NAME, f)",
            ["setattr(masking_utils, NAME, f)"],
        ),
        ("import os, torch\nos._exit(1)\nself._own\nnode['_target_']\ntorch.backends.cudnn.allow_tf32 = True", []),
        ("from pretrain.data.order import _own\nimport torch\nself.tensor = torch.zeros(3)", []),
    ],
)
def test_private_uses_are_seen(line, uses):
    assert list(foreign_private(line, own={"_own"})) == uses


# -- each library's private parts are what they are taken for ---------------------------------------------------------------


def test_hydra_reads_files_with_our_source(tmp_path):
    from hydra.types import RunMode

    from pretrain.config import hydra_internals

    (tmp_path / "config.yaml").write_text("a: 1\nhydra: {output_subdir: null}\n")
    read = []

    class Source(hydra_internals.FileSource):
        def load_config(self, config_path):
            read.append(self.file(config_path))
            return super().load_config(config_path)

    before = dict(hydra_internals.SourcesRegistry.instance().types)
    try:
        hydra_internals.use_file_source(Source)
        loader = hydra_internals.ConfigLoaderImpl(hydra_internals.create_config_search_path(str(tmp_path)))
        config = loader.load_configuration("config", overrides=["a=2"], run_mode=RunMode.RUN)
    finally:
        hydra_internals.SourcesRegistry.instance().types.update(before)
    assert config.a == 2
    assert tmp_path / "config.yaml" in read
    options = hydra_internals.get_args_parser().parse_args(["--cfg", "job", "--config-dir", "d", "a=2"])
    assert (options.cfg, options.config_dir, options.overrides, options.multirun) == ("job", "d", ["a=2"], False)
    assert (config.hydra.launcher._target_, config.hydra.sweeper._target_) == (
        hydra_internals.BASIC_LAUNCHER,
        hydra_internals.BASIC_SWEEPER,
    )


def test_omegaconf_resolves_every_reference_by_the_replaced_methods():
    from omegaconf import OmegaConf

    from pretrain.config import interpolation
    from pretrain.runtime.errors import UserError

    config = OmegaConf.create({"a": "x" * 1000, "b": "${a}", "c": ["${a}${b}", "${oc.env:HOME}"]})
    assert interpolation._size(config) == 3 + 1000 + len("${a}") + 2 + len("${a}${b}") + len("${oc.env:HOME}")
    with interpolation.bounded_interpolation():
        assert len(config.c[0]) == 2000
    config.many = ["${a}" * 500] * 3
    with pytest.raises(UserError, match="expand to more"), interpolation.bounded_interpolation():
        OmegaConf.to_container(config, resolve=True)


def test_the_agent_of_torch_has_the_places_that_are_overridden():
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import MultiprocessContext

    assert list(inspect.signature(LocalElasticAgent._start_workers).parameters) == ["self", "worker_group"]
    assert list(inspect.signature(LocalElasticAgent._monitor_workers).parameters) == ["self", "worker_group"]
    assert "self._remaining_restarts" in inspect.getsource(SimpleElasticAgent._invoke_run), "whether it restarts"
    assert "self._pcontext.close(" in inspect.getsource(LocalElasticAgent._shutdown), "how it ends the workers"
    assert "self._rdzv_handler =" in inspect.getsource(SimpleElasticAgent.__init__) + inspect.getsource(
        LocalElasticAgent
    )
    assert "self._pc.processes" in inspect.getsource(MultiprocessContext)


def tiny(**more):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_key_value_heads=2, **shape, **more))


def test_transformers_models():
    from pretrain.models import transformers_internals as internals

    model = tiny()
    assert internals.unsplit_classes(model) == {"LlamaDecoderLayer"}
    before = torch.random.get_rng_state()
    other = internals.new_on_meta(model, dtype=torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(other) is type(model)
    assert {(p.dtype, p.is_meta) for p in other.parameters()} == {(torch.bfloat16, True)}
    assert not internals.is_listed_as_fp32(model, torch.bfloat16)("model.norm.weight")
    type(model)._keep_in_fp32_modules_strict = {"norm"}
    try:
        listed = internals.is_listed_as_fp32(tiny(), torch.bfloat16)
    finally:
        del type(model)._keep_in_fp32_modules_strict
    assert [listed(name) for name in ("model.norm.weight", "lm_head.weight")] == [True, False]


def test_transformers_asks_whether_documents_are_packed():
    from pretrain.models import transformers_internals as internals

    asked = []
    model = tiny().eval()
    ids = torch.arange(8)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        apart = model(ids[:, 4:], use_cache=False).logits
        internals.set_packing_check(lambda given: asked.append(given) or (torch.arange(8)[None] // 4))
        try:
            packed = model(ids, position_ids=positions, use_cache=False).logits[:, 4:]
        finally:
            internals.set_packing_check(internals.own_packing_check)
    assert len(asked) == 1
    assert torch.equal(asked[0], positions)
    assert torch.allclose(packed, apart, atol=1e-6)


def test_hooks_of_a_module():
    from pretrain.models.transformers_internals import has_forward_hooks

    layer = nn.Linear(2, 2)
    assert not has_forward_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *given: None)
        assert has_forward_hooks(layer)
        handle.remove()
        assert not has_forward_hooks(layer)


def test_optuna_resumes_an_open_trial():
    optuna = pytest.importorskip("optuna")
    from optuna.storages.journal._storage import JournalOperation

    from pretrain.sweep import optuna_internals as internals

    assert JournalOperation.CREATE_TRIAL == internals.CREATE_TRIAL
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.ask()
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    (_, copy) = study.trials
    resumed = internals.open_trial(study, copy)
    assert (resumed.number, resumed.params) == (1, trial.params)
    resumed.report(3.0, step=1)
    study.tell(resumed, 2.0)
    assert (study.best_trial.number, study.best_trial.intermediate_values) == (1, {1: 3.0})


def test_datasets(tmp_path):
    from datasets import Dataset, load_dataset_builder

    from pretrain.data.sources import datasets_internals as internals

    made = [Dataset.from_dict({"text": [text]}) for text in ("a", "a", "b")]
    first, _, other = map(internals.fingerprint, made)
    assert first != other
    assert first.isalnum(), "a folder has this name"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("text\na\n")
    builder = load_dataset_builder(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert Path(internals.downloads_folder(builder)).is_relative_to(tmp_path / "cache")


def test_deepspeed_has_what_is_used_of_it():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.compiler import compile as compiled
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Stage2
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    from pretrain.strategy.deepspeed_internals import disable_compilation

    for stage, names in (
        (Stage2, "scaled_global_norm _lazy_init_hp_params_optimizer_state"),
        (Stage3, "_get_norm_groups _partition_all_parameters _reassign_or_swap_out_partitioned_parameters _post_step"),
    ):
        source = inspect.getsource(stage)
        assert [name for name in names.split() if f"self.{name}(" not in source] == [], "it calls them itself"
        assert "self._global_grad_norm =" in source
        assert "self.overflow" in source
    assert "self._hp_optimizer_states_linked" in inspect.getsource(Stage2)
    assert callable(Stage2.update_lp_params)
    in_stage2, in_stage3 = inspect.getsource(Stage2), inspect.getsource(Stage3)
    for name in ("bit16_groups", "single_partition_of_fp32_groups", "norm_for_param_grads"):
        assert f"self.{name}" in in_stage2
    for name in ("fp32_partitioned_groups_flat", "grad_position", "norm_for_param_grads"):
        assert f"self.{name}" in in_stage3
    for name in ("_get_fp32_opt_state_partition", "_get_fp32_grad_state_partition", "_get_param_partition_rank"):
        assert callable(getattr(Stage3, name))
    fragments = inspect.getsource(import_module("deepspeed.utils.tensor_fragment"))
    for name in ("_hp_mapping", "_index_in_param_group", "get_lp_grad_fragment", "hp_fragment", "lp_fragment_address"):
        assert name in fragments
    assert "lp_fragment_address" in inspect.signature(tensor_fragment).parameters
    assert list(inspect.signature(fragment_address).parameters) == ["numel", "start"], "of a rank's part of a parameter"
    assert callable(compiled), "replaced by disable_compilation"
    disable_compilation()


def test_deepspeed_s_loss_scale_is_read_and_restored():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from pretrain.strategy.deepspeed_internals import ZeroOptimizer

    def zero_of(scale):
        scaler = DynamicLossScaler(scale, scale_window=2, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
        inner = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler), zero_optimization_stage=lambda: 2)
        return scaler, ZeroOptimizer(inner)

    scaler, zero = zero_of(32768.0)
    scaler.update_scale(False)
    state = zero.loss_scale_state()
    assert state == {
        "scale": 32768.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2,
        "_growth_tracker": 1,
    }
    scaler, other = zero_of(4.0)
    other.load_loss_scale(state)
    assert (other.loss_scale, other.loss_scale_state()) == (32768.0, state)
    scaler.update_scale(False)
    assert other.loss_scale == 32768.0
    scaler.update_scale(False)
    assert other.loss_scale == 65536.0
