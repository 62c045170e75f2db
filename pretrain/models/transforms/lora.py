"""LoRA (Hu et al. 2021, arXiv:2106.09685), injected by PEFT and written in its format. Source: https://huggingface.co/docs/peft"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from pretrain.models.transforms.base import ModelTransform, set_lr_factor
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.patterns import compiled, summary

if TYPE_CHECKING:
    from torch import Tensor, nn

SCALE = 2.0  # of the update, where alpha is null
A, B, MAGNITUDE, BASE = (
    ".lora_A.default.weight",
    ".lora_B.default.weight",
    ".lora_magnitude_vector.default.weight",
    ".base_layer.",
)
ROLES = {
    "embeddings": "get_input_embeddings",
    "head": "get_output_embeddings",
}  # word in modules_to_save → method of the model


@dataclass(frozen=True)
class Lora(ModelTransform):
    """Train low-rank updates of linear layers, and nothing else of the model. The exported ``model/`` has them merged;
    ``adapter/`` beside it holds them alone, in PEFT's format.

    Attributes:
        rank: Rank of the updates.
        alpha: The updates are multiplied by alpha / rank (rslora: alpha / √rank); null: by 2.
        dropout: Dropout before the updates.
        targets: auto: all linear layers but the head; else a regex of the names of modules.
        rslora: true: a scale that suits high ranks (Kalajdzievski 2023, arXiv:2312.03732).
        dora: true: train also the norm of each row (Liu et al. 2024, arXiv:2402.09353); slower.
        modules_to_save: Modules that are trained in full: embeddings · head · the end of a module's name.
        modules_to_save_lr: Factor of the learning rate of modules_to_save.
        adapter: Folder of a LoRA adapter of PEFT, which is trained further; it sets rank, alpha, targets, rslora and dora.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str = "auto"
    rslora: bool = False
    dora: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    modules_to_save_lr: PositiveFloat = 1.0
    adapter: str | None = None
    _applied: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # what `export` needs

    def check(self) -> None:
        if find_spec("peft") is None:
            raise UserError("transform.lora needs the package peft: pip install 'pretrain[peft]'")
        if self.targets != "auto":
            compiled(self.targets, key="transform.lora.targets")
        if self.adapter is not None:
            from pretrain.models.transforms.peft_adapter import read_config

            given: dict[str, Any] = {
                "rank": self.rank,
                "alpha": self.alpha,
                "targets": self.targets,
                "rslora": self.rslora,
            }
            given |= {"dora": self.dora, "modules_to_save": self.modules_to_save}
            default = Lora()
            if own := [key for key, value in given.items() if value != getattr(default, key)]:
                raise UserError(
                    f"transform.lora.{own[0]} with transform.lora.adapter: the adapter itself sets it; remove it"
                )
            read_config(self.adapter)

    def apply(self, model: nn.Module) -> None:
        from pretrain.models.transforms.peft_adapter import inject, load_adapter

        config = self._config(model)
        model.requires_grad_(False)
        layers = inject(model, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        saved = with_tied(model, saved_modules(model, config.modules_to_save or ()))
        if self.adapter is not None:
            load_adapter(self.adapter, model, saved)
        for module in saved.values():
            for parameter in module.parameters():
                parameter.requires_grad_(True)
                set_lr_factor(parameter, self.modules_to_save_lr)
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        in_full = {f"{name}.{part}": first[id(p)] for name, m in saved.items() for part, p in m.named_parameters()}
        self._applied.update(config=config, layers=layers, in_full=in_full)

    def _config(self, model: Any) -> Any:
        """Return PEFT's config of this adapter, or of the one that is continued."""
        from peft import LoraConfig

        if self.adapter is not None:
            from pretrain.models.transforms.peft_adapter import read_config

            known = read_config(self.adapter)
            return LoraConfig(**known | {"lora_dropout": self.dropout, "inference_mode": False})
        names = self._targets(model)
        scale = math.sqrt(self.rank) if self.rslora else self.rank
        return LoraConfig(
            r=self.rank,
            lora_alpha=SCALE * scale if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=shortened(names, [name for name, _ in model.named_modules()]),
            use_rslora=self.rslora,
            use_dora=self.dora,
            modules_to_save=[*with_tied(model, saved_modules(model, self.modules_to_save))] or None,
            task_type="CAUSAL_LM",
        )

    def _targets(self, model: Any) -> list[str]:
        """Return the names of the layers that get an update. Raises ``UserError`` where there is none, and for a rank above that
        of a matrix."""
        linear, head = linear_layers(model), model.get_output_embeddings()
        fused = [name for name, p in model.named_parameters() if p.ndim > 2]
        if self.targets == "auto":
            saved = {id(module) for module in saved_modules(model, self.modules_to_save).values()}
            every = [name for name, module in linear.items() if module is not head and id(module) not in saved]
            names = [name for name in every if self.rank <= min(linear[name].weight.shape)]
            if names and (small := [name for name in every if name not in names]):
                notice(f"transform.lora: without {summary(small)}, which are smaller than the rank {self.rank}")
            names = names or every
        else:
            pattern = compiled(self.targets, key="transform.lora.targets")
            names = [name for name in linear if pattern.search(name)]
        if not names:
            raise UserError(
                f"transform.lora.targets={self.targets!r} matches no linear layer; there is {summary(linear) or 'none'}"
                + (f"; weights of fused layers, which LoRA can't update: {summary(fused)}" if fused else "")
            )
        tied = {id(p) for name, p in tied_parameters(model)}
        for name in names:
            if id(linear[name].weight) in tied:
                raise UserError(
                    f"transform.lora.targets={self.targets!r}: {name} is tied to another weight, which a merged model could not "
                    "keep; train both with transform.lora.modules_to_save=[head]"
                )
            smaller = min(linear[name].weight.shape)
            if self.rank > smaller:
                shape = " × ".join(map(str, linear[name].weight.shape))
                raise UserError(f"transform.lora.rank={self.rank}: {name} is {shape}, whose rank is at most {smaller}")
        return names

    def export(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = {}
        for name, tensor in state_dict.items():
            layer, is_base, rest = name.rpartition(BASE)
            if is_base and rest == "weight" and layer in self._applied["layers"]:
                merged[f"{layer}.weight"] = self._merged(layer, tensor, state_dict)
            elif not is_adapter(name):
                merged[f"{layer}.{rest}" if is_base else name] = tensor
        return merged

    def _merged(self, layer: str, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the weight of a layer with its update, computed in fp32: W + s·BA. With DoRA each row of it is scaled to its
        trained norm."""
        scale, transposed = self._applied["layers"][layer]
        rows = weight.float().T if transposed else weight.float()
        rows = rows + scale * (state[layer + B].float() @ state[layer + A].float())
        if layer + MAGNITUDE in state:
            rows = rows * (state[layer + MAGNITUDE].float() / rows.norm(dim=1))[:, None]
        return (rows.T if transposed else rows).to(weight.dtype).contiguous()

    def companions(self, state_dict: dict[str, Tensor]) -> dict[str, dict[str, bytes]]:
        from pretrain.models.transforms.peft_adapter import written

        return {"adapter": written(self._applied["config"], state_dict, self._applied["in_full"])}


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is one of the adapter's."""
    return name.endswith((A, B, MAGNITUDE))


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers of a model by name, those of GPT-2 (`Conv1D`, whose weight is transposed) too."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def saved_modules(model: Any, words: Iterable[str]) -> dict[str, Any]:
    """Return the modules that ``words`` name, by their names. Raises ``UserError`` for a word that names none."""
    named = {name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    found: dict[str, Any] = {}
    for word in words:
        if word in ROLES:
            wanted = getattr(model, ROLES[word])()
            matched = {name: module for name, module in named.items() if module is wanted}
        else:
            matched = {name: module for name, module in named.items() if name == word or name.endswith(f".{word}")}
        if not matched:
            raise UserError(
                f"transform.lora.modules_to_save: no module {word!r}; there is embeddings, head, {summary(named)}"
            )
        found |= matched
    return found


def tied_parameters(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the parameters, by each of their names, that a model uses in several places."""
    named = [*model.named_parameters(remove_duplicate=False)]
    uses = Counter(id(parameter) for _, parameter in named)
    return [(name, parameter) for name, parameter in named if uses[id(parameter)] > 1]


def with_tied(model: nn.Module, modules: dict[str, Any]) -> dict[str, Any]:
    """Return ``modules`` and those that a weight of them is tied to."""
    own = {id(p) for module in modules.values() for p in module.parameters()}
    places = {name.rpartition(".")[0] for name, p in tied_parameters(model) if id(p) in own}
    return modules | {name: model.get_submodule(name) for name in sorted(places)}


def shortened(names: list[str], every: list[str]) -> list[str]:
    """Return the last parts of ``names`` if they name the same modules among ``every``, otherwise ``names``."""
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in every if name.rpartition(".")[2] in short}
    return short if meant == set(names) else sorted(names)
