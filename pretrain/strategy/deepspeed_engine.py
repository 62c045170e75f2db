"""The engines of ``strategy=deepspeed``. DeepSpeed averages, clips and updates; what a checkpoint holds is made here,
one whole tensor at a time, so that it moves to every other strategy and number of ranks.

DeepSpeed's flat shards know no rows, so a rank does not write what it holds but its share of the names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import utils as ds_utils
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError
from torch import Tensor, nn

from pretrain.data.batch import Batch
from pretrain.distributed.sharding import TensorFiles, TensorShard, check_names, check_shape, described
from pretrain.models.dtypes import kept_fp32
from pretrain.models.meta import cast_parameters, put_buffers
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.strategy.engine import Engine, never

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.distributed.context import DistributedContext
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.precision import Precision


def begin(config: dict[str, Any]) -> None:
    """Join DeepSpeed to the process group that there is, and have it check its config.

    Its own CPU communication is left out: a minute of C++ at the first use, and for inference alone. So are its kernels
    of Muon, an optimizer that no run here has: decorating them imports torch's whole compiler, for a second.

    Raises ``UserError`` for a config that DeepSpeed refuses.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    communication = vars(import_module("deepspeed.comm.torch"))
    assert "build_shm_op" in communication, f"DeepSpeed {deepspeed.__version__} builds its CPU communication elsewhere"
    communication["build_shm_op"] = lambda: None
    vars(import_module("deepspeed.runtime.compiler"))["compile"] = lambda: lambda function: function
    deepspeed.init_distributed()
    check_config(config)


def check_config(config: dict[str, Any]) -> None:
    """Raises ``UserError`` for a config that DeepSpeed refuses."""
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise UserError(f"strategy.config: {error.title}.{key}: {wrong['msg']}") from None
    except (DeepSpeedConfigError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"strategy.config: DeepSpeed refuses it: {error}") from None


def wrap(model: LanguageModel, optimizer: Optimizer, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine, without what it prints about memory."""
    with redirect_stdout(StringIO()):
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


class ReplicatedEngine(Engine):
    """Stage 0: whole copies. DeepSpeed averages the gradients; clipping, optimizer, autocast and loss scaler are those
    of every other strategy."""

    def __init__(self, *args: Any, wrapped: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._wrapped = wrapped

    @classmethod
    def build(
        cls,
        factory: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        *,
        config: dict[str, Any],
        world: DistributedContext,
        **options: Any,
    ) -> ReplicatedEngine:
        begin(config)
        model = factory.build(world.device)
        update = optimizer(model)
        wrapped = wrap(model, update, config)
        return cls(model, update, world=world, wrapped=wrapped, replicas=world.size, **options)

    def backward(self, batch: Batch, *, tokens: int, last: bool) -> Tensor:
        self._wrapped.set_gradient_accumulation_boundary(last)
        with self.autocast():
            loss = self.model(batch.input_ids, batch.labels, batch.position_ids)
        loss = loss / tokens
        self._wrapped.backward(self.scaler.scale(loss * self.replicas), scale_wrt_gas=False)
        return loss.detach()


class DeepspeedEngine(Engine):
    """Stages 1 to 3. ``wrapped``: DeepSpeed's engine, whose optimizer holds fp32 weights and moments in flat shards.

    What DeepSpeed decides takes the place of ours: clipping to the norm it was configured with, and under fp16 its loss
    scale. A step with a non-finite gradient is skipped in every precision.
    """

    has_gradients = False

    def __init__(self, *args: Any, wrapped: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._wrapped = wrapped
        self._zero = wrapped.optimizer
        self._stage = int(wrapped.zero_optimization_stage())

    @classmethod
    def build(
        cls,
        factory: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        *,
        config: dict[str, Any],
        precision: Precision,
        world: DistributedContext,
        sharded_export: bool,
    ) -> DeepspeedEngine:
        """Build the model whole, at stage 3 on the host, and hand it to DeepSpeed."""
        begin(config)
        partitioned = config["zero_optimization"]["stage"] == 3
        model = factory.build(torch.device("cpu") if partitioned else world.device)
        num_parameters = sum(p.numel() for p in model.parameters())
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
        update = optimizer(model)
        fp32 = {p: p.data for p in model.parameters()} if precision.compute != "float32" else {}
        tell_rounded(model, precision)
        if partitioned:
            partition(model, config, precision.compute_dtype)
        wrapped = wrap(model, update, config)
        put_buffers(model, buffers, world.device)
        engine = cls(
            model,
            update,
            precision=precision,
            world=world,
            step_module=wrapped,
            replicas=world.size,
            sharded_export=sharded_export,
            wrapped=wrapped,
        )
        for parameter in list(fp32):  # DeepSpeed makes its fp32 weights from the 16-bit ones
            engine._assign(parameter, fp32.pop(parameter))
        engine.num_parameters = num_parameters
        return engine

    @property
    def loss_scale(self) -> Tensor | float | None:
        return float(self._zero.loss_scaler.cur_scale) if self.scaler.is_enabled() else None

    # -- one step -----------------------------------------------------------------------------------------------------

    def backward(self, batch: Batch, *, tokens: int, last: bool) -> Tensor:
        self._wrapped.set_gradient_accumulation_boundary(last)
        loss = self.step_module(batch.input_ids, batch.labels, batch.position_ids) / tokens
        self._wrapped.backward(loss * self.replicas, scale_wrt_gas=False)
        return loss.detach()

    def step(self, max_norm: float | None, *, refuse: Callable[[Tensor], Tensor] = never) -> Tensor:
        """``refuse`` is asked before the norm is known, with 0: DeepSpeed itself refuses what is not finite. It waits for
        the device in every step, so reading the answer costs nothing more."""
        assert (max_norm or 0.0) == self._wrapped.gradient_clipping()
        with self._infinite_norm() if refuse(torch.zeros((), device=self.world.device)) else nullcontext():
            self._wrapped.step()
        self.skipped += int(self._zero.overflow)
        return torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self.world.device)

    @contextmanager
    def _infinite_norm(self) -> Iterator[None]:
        """DeepSpeed finds a norm that is infinite, and leaves the step out, with all that it has to clear."""
        measure = "scaled_global_norm" if self._stage < 3 else "_get_norm_groups"
        infinite = torch.tensor(float("inf"), device=self.world.device)
        setattr(self._zero, measure, lambda: infinite if self._stage < 3 else [infinite])
        try:
            yield
        finally:
            delattr(self._zero, measure)

    def forward(self, *inputs: Tensor | None, **more: Tensor) -> Tensor:
        found: Tensor = self.step_module(*inputs, **more)
        return found

    # -- state --------------------------------------------------------------------------------------------------------

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.hf_state().items():
            yield name, self._whole(tensor)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        own: dict[str, dict[str, TensorShard]] = {"model": {}, "optimizer": {}}
        every: dict[str, Any] = {"model": {}, "optimizer": {}}
        for i, (kind, name, tensor) in enumerate(self._whole_tensors()):
            every[kind][name] = described(tensor)
            if i % self.world.size == self.world.rank:
                own[kind][name] = TensorShard(tensor.detach().cpu(), 0, tuple(tensor.shape))
        return own | {"tensors": every, "scaler": self._loss_scale() | {"skipped": int(self.skipped)}}

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Below stage 3 the weights that the forward uses; all else lies in shards."""
        if self._stage < 3:
            yield from self.model.hf_state().items()

    def _whole_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """("model" or "optimizer", name, tensor) of everything a checkpoint holds. A collective."""
        for name, tensor in self.whole_weights():
            yield "model", name, tensor
        self._link_moments()
        moments = self.optimizer.state.get(self._shards()[0], {})  # nothing before the first step
        for name, parameter in self.model.hf_named_parameters():
            for key, value in moments.items() if parameter.requires_grad else ():
                if value.ndim == 0:  # the count of steps, the same for all
                    yield "optimizer", f"{name}/{key}", value.clone()
                else:
                    yield "optimizer", f"{name}/{key}", ds_utils.safe_get_full_optimizer_state(parameter, key)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_moments(state)
        self._load_weights(state["model"])
        self.load_moments(state["optimizer"])
        self.skipped.fill_(state["scaler"].get("skipped", 0))
        self._set_loss_scale(state["scaler"])

    def _load_weights(self, files: TensorFiles) -> None:
        own = self.model.hf_state()
        check_names(own, files)
        for name, tensor in own.items():
            check_shape(name, files, tuple(getattr(tensor, "ds_shape", tensor.shape)))
            self._assign(tensor, files.read(name))
        self._update_weights()

    def load_moments(self, files: TensorFiles) -> None:
        self.optimizer.state.clear()
        parameters = dict(self.model.hf_named_parameters())
        slots = [(slot, *slot.rsplit("/", 1)) for slot in sorted(files.keys())]
        counts = {key: files.read(slot) for slot, _, key in slots if not files.shape(slot)}
        for shard in self._shards():
            on_device = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
            for _, _, key in slots:
                if key in counts:
                    value = counts[key].to(shard.device if on_device else "cpu", copy=True)
                else:
                    value = torch.zeros_like(shard, requires_grad=False)
                self.optimizer.state[shard][key] = value
        self._link_moments()
        for slot, name, key in slots:
            if key not in counts:
                self._assign(parameters[name], files.read(slot), key)

    # -- DeepSpeed's shards -------------------------------------------------------------------------------------------

    def _shards(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimizer updates on this rank."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [shard for group in self.optimizer.param_groups for shard in group["params"]]

    def _link_moments(self) -> None:
        """Give parameters their views of the moments in the shards, as far as there are any. DeepSpeed does it once, when
        only the first group of parameters has been updated."""
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _whole(self, tensor: Tensor) -> Tensor:
        """A weight in fp32 as the optimizer has it; a buffer as it is. A collective."""
        if not isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.requires_grad:
            weight: Tensor = ds_utils.safe_get_full_fp32_param(tensor)
            return weight
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().float().clone()

    @torch.no_grad()
    def _assign(self, tensor: Tensor, value: Tensor, key: str | None = None) -> None:
        """Put the whole ``value`` of a weight, or of its moment ``key``, into this rank's fp32 shard."""
        if not tensor.requires_grad:  # a buffer, a frozen weight
            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                tensor.copy_(value)
        elif self._stage < 3:
            if key is None:
                ds_utils.safe_set_full_fp32_param(tensor, value)
            else:
                ds_utils.safe_set_full_optimizer_state(tensor, value, key)
        else:
            shard = padded_shard(value, tensor)
            if key is None:
                ds_utils.safe_set_local_fp32_param(tensor, shard)
            else:
                ds_utils.safe_set_local_optimizer_state(tensor, shard, key)

    def _update_weights(self) -> None:
        """Make the weights of the model from the fp32 ones, as at the end of a step."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for i in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(i)
        self._zero._post_step(set())

    def _loss_scale(self) -> dict[str, float]:
        """DeepSpeed's dynamic loss scale under the names of torch's ``GradScaler``."""
        scaler = self._zero.loss_scaler if self.scaler.is_enabled() else None
        if scaler is None or not scaler.dynamic:
            return {}
        return {
            "scale": float(scaler.cur_scale),
            "growth_factor": scaler.scale_factor,
            "backoff_factor": 1 / scaler.scale_factor,
            "growth_interval": scaler.scale_window,
            "_growth_tracker": (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window,
        }

    def _set_loss_scale(self, state: dict[str, float]) -> None:
        if self.scaler.is_enabled() and "scale" in state and self._zero.loss_scaler.dynamic:
            self._zero.loss_scaler.cur_scale = state["scale"]
            self._zero.loss_scaler.cur_iter = int(state["_growth_tracker"])
            self._zero.loss_scaler.last_overflow_iter = -1


def tell_rounded(model: LanguageModel, precision: Precision) -> None:
    """Say which parameters ZeRO computes with in 16 bits that a model wants in fp32: its flat shards have one type."""
    parameters = {name for name, _ in model.hf_named_parameters()}
    kept = sorted(kept_fp32(model.hf, precision.compute_dtype) & parameters)
    if kept:
        notice(
            f"strategy=deepspeed: {len(kept)} weights that the model wants in fp32 (e.g. {kept[0]}) are computed with in "
            f"{precision.compute}; strategy=ddp and strategy=fsdp with bf16-true keep them in fp32"
        )


def partition(model: LanguageModel, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Cut every weight into shards on the devices, one after the other; the loss needs the head's from outside of it."""
    cast_parameters(model, dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=dtype)
    for parameter in model.hf.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


def padded_shard(value: Tensor, parameter: Any) -> Tensor:
    """This rank's part of ``value`` as ZeRO-3 cuts it: flat, equal parts, zeros at the end of the last."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
    part = value.flatten()[rank * size : (rank + 1) * size].to(torch.float32)
    return nn.functional.pad(part, (0, size - part.numel()))
