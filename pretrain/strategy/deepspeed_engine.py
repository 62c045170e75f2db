"""The engines of ``strategy=deepspeed``. DeepSpeed averages gradients, clips and updates. The checkpoints are written by
this program, one full tensor at a time, so that any other strategy and number of ranks can resume from them.

DeepSpeed's flat shards do not end at rows of a tensor. Therefore a rank does not write its own shards; the full tensors
are gathered, and each rank writes its share of them: at stage 3, where a rank has a part of every tensor, a share of the rows of
each, and below, where it has a part of a few, full tensors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
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
from pretrain.distributed.sharding import TensorFiles, TensorShard, check_names, check_shape, described, equal_part
from pretrain.models.dtypes import kept_fp32
from pretrain.models.meta import cast_parameters, put_buffers
from pretrain.optim.combined import combined
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.strategy.deepspeed_internals import ZeroOptimizer, disable_compilation
from pretrain.strategy.deepspeed_optimizer import check_moments, split_by_thaw, supported
from pretrain.strategy.engine import Engine, count_parameters, never
from pretrain.strategy.zero_internals import ZeroShards
from pretrain.strategy.zero_weights import ZeroWeights

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.distributed.context import DistributedContext
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.precision import Precision


REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default of reduce_bucket_size


def join_process_group(config: dict[str, Any]) -> None:
    """Make DeepSpeed use the existing process group, and let it check its config.

    Raises ``UserError`` for a config that DeepSpeed rejects.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    disable_compilation()
    deepspeed.init_distributed()
    check_config(config)


def check_config(config: dict[str, Any]) -> None:
    """Raise ``UserError`` for a config that DeepSpeed rejects."""
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise UserError(f"strategy.config: {error.title}.{key}: {wrong['msg']}") from None
    except (DeepSpeedConfigError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"strategy.config: DeepSpeed rejects it: {error}") from None


def wrap(model: LanguageModel, optimizer: Optimizer, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine, without its output about memory."""
    with redirect_stdout(StringIO()):
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


class ReplicatedEngine(Engine):
    """The engine of stage 0, with a full copy of the model on every rank. DeepSpeed averages the gradients; clipping,
    optimizer, autocast and loss scaler are those of every other strategy."""

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
        join_process_group(config)
        model = factory.build(world.device)
        update = combined(optimizer(model))
        wrapped = wrap(model, update, config)
        return cls(model, update, world=world, wrapped=wrapped, replicas=world.size, **options)

    def backward(self, batch: Batch, *, tokens: float, last: bool) -> Tensor:
        self._wrapped.set_gradient_accumulation_boundary(last)
        loss, reported = self.losses(batch)
        self._wrapped.backward(self.scaler.scale(loss / tokens * self.replicas), scale_wrt_gas=False)
        return reported / tokens


class DeepspeedEngine(Engine):
    """The engine of stages 1 to 3. ``wrapped`` is DeepSpeed's engine, whose optimizer holds fp32 weights and moments in flat
    shards.

    DeepSpeed's own clipping (to the norm in its config) and, under fp16, its own loss scale are used. A step with a
    non-finite gradient is skipped in every precision.
    """

    # A step of n micro-batches with T target tokens (or sum of their weights) in the global batch, on R ranks:
    #     for each micro-batch:
    #         loss = (sum of its token losses) / T
    #         wrapped.backward(loss * R)    # DeepSpeed averages over R ranks, so the factor R makes it a sum
    #     wrapped.step()                    # clip, update this rank's fp32 shard, renew the 16-bit weights from it
    # If the guard rejects the step, DeepSpeed's norm is replaced by infinity, so that it skips the update itself.
    #
    # Saving: for tensor i of all weights and moments, in the same order on every rank:
    #     full = the fp32 tensor gathered from the shards of all ranks    # a collective
    #     rank i mod R keeps and writes it, at stage 3 every rank its share of the rows; the rest is dropped
    # Loading: every rank reads the rows of each tensor with its own part, copies that into its flat fp32 shard, and at the end
    # renews the 16-bit weights from the fp32 ones.

    has_gradients = False

    def __init__(self, *args: Any, wrapped: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._wrapped = wrapped
        self.zero = ZeroOptimizer(wrapped)
        self.shards = ZeroShards(wrapped)
        self.weights = ZeroWeights(self)
        self._frozen_groups: list[dict[str, Any]] = []

    @classmethod
    def build(
        cls,
        factory: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        *,
        config: dict[str, Any],
        precision: Precision,
        world: DistributedContext,
        **options: Any,
    ) -> DeepspeedEngine:
        """Build the full model (at stage 3 on the host) and pass it to DeepSpeed."""
        join_process_group(config)
        partitioned = config["zero_optimization"]["stage"] == 3
        model = factory.build(torch.device("cpu") if partitioned else world.device)
        stage, transformed = config["zero_optimization"]["stage"], model.transformed
        counts = count_parameters(model)
        # DeepSpeed allocates the whole bucket, 5e8 numbers by default, also for a model that never fills it.
        zero = config["zero_optimization"]
        zero.setdefault("reduce_bucket_size", min(REDUCE_BUCKET, max(counts[1], 1)))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
        update = supported(optimizer(model), stage)
        if transformed is not None:
            split_by_thaw(update, model.hf_named_parameters(), transformed.thaw_at)
        fp32 = {p: p.data for p in model.parameters()} if precision.compute != "float32" else {}
        report_rounded(model, precision)
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
            wrapped=wrapped,
            **options,
        )
        for parameter in list(fp32):  # because DeepSpeed has initialised its fp32 weights from the 16-bit ones
            engine.assign(parameter, fp32.pop(parameter))
        engine.num_parameters, engine.num_trained = counts
        return engine

    @property
    def loss_scale(self) -> Tensor | float | None:
        return self.zero.loss_scale if self.scaler.is_enabled() else None

    # -- one step -----------------------------------------------------------------------------------------------------

    def backward(self, batch: Batch, *, tokens: float, last: bool) -> Tensor:
        self._wrapped.set_gradient_accumulation_boundary(last)
        loss, reported = self.losses(batch)
        self._wrapped.backward(loss / tokens * self.replicas, scale_wrt_gas=False)
        return reported / tokens

    def step(self, max_norm: float | None, *, refuse: Callable[[Tensor], Tensor] = never) -> Tensor:
        """Take a step. ``refuse`` is called with 0, because the norm is not known yet; DeepSpeed itself skips a step whose norm
        is not finite. DeepSpeed waits for the device in every step, so reading the answer does not add a wait."""
        assert (max_norm or 0.0) == self._wrapped.gradient_clipping()
        device = self.world.device
        self._drop_frozen()
        if self.term is not None:
            self.term.add_gradients(self)
        with self.zero.infinite_norm(device) if refuse(torch.zeros((), device=device)) else nullcontext():
            self._wrapped.step()
        for parameter in self._frozen:  # it has no state before its first update
            self.optimizer.state.pop(self.shards.shard_of(parameter), None)
        self.skipped += int(self.zero.skipped)
        return torch.as_tensor(self.zero.grad_norm, dtype=torch.float32, device=device)

    def set_progress(self, share: float) -> None:
        super().set_progress(share)
        self._frozen_groups = [g for g in self.optimizer.param_groups if share < g.get("thaw_at", 0.0)]

    def _drop_frozen(self) -> None:
        for group in self._frozen_groups:
            group["lr"] = 0.0  # neither does weight decay change it
        if not (self._frozen or self._frozen_rows):
            return
        names = {id(p): name for name, p in self.model.hf_named_parameters()}
        whole = ((p, None) for p in self._frozen)
        for parameter, row in (*whole, *self._frozen_rows):
            gradient = self.shards.gradient_part(parameter)
            if gradient is None:
                continue
            shape = getattr(parameter, "ds_shape", parameter.shape)
            end = None if row is None else max(0, row * shape[1:].numel() - self.shards.own_range(parameter)[0])
            gradient[:end] = 0
            self.weights.gradient_changed(names[id(parameter)], gradient)

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext()  # the weights of the forward have the matmul dtype

    def forward(self, *inputs: Tensor | None, **more: Any) -> Any:
        found = self.step_module(*inputs, **more)
        self.alive()
        return found

    # -- state --------------------------------------------------------------------------------------------------------

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.hf_state().items():
            yield name, self.whole(tensor)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        own: dict[str, dict[str, TensorShard]] = {"model": {}, "optimizer": {}}
        every: dict[str, Any] = {"model": {}, "optimizer": {}}
        owners: dict[str, dict[str, int]] = {"model": {}, "optimizer": {}}
        rank, ranks, by_rows = self.world.rank, self.world.size, self.zero.stage == 3
        for i, (kind, name, tensor) in enumerate(self._whole_tensors()):
            every[kind][name] = described(tensor)
            if by_rows:
                shard = equal_part(tensor.detach(), rank, ranks)
            else:
                owners[kind][name] = owner = i % ranks if tensor.ndim else 0
                shard = TensorShard(tensor.detach(), 0, tuple(tensor.shape)) if owner == rank else None
            if shard is not None:
                own[kind][name] = replace(shard, tensor=shard.tensor.to("cpu", copy=True))
        scaler = self.zero.loss_scale_state() if self.scaler.is_enabled() else {}
        shared = {"owners": owners} if ranks > 1 and not by_rows else {}
        return own | shared | {"tensors": every, "scaler": scaler | {"skipped": int(self.skipped)}}

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that the forward uses, below stage 3; everything else is sharded."""
        if self.zero.stage < 3:
            yield from self.model.hf_state().items()

    def _whole_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield ("model" or "optimizer", name, full tensor) of everything that a checkpoint holds. This is a collective."""
        for name, tensor in self.full_weights():
            yield "model", name, tensor
        self.zero.link_moments()
        for name, parameter in self.model.hf_named_parameters():
            if not parameter.requires_grad:
                continue
            moments = self.optimizer.state.get(self.shards.shard_of(parameter), {})  # empty before the first update
            for key, value in sorted(moments.items()):
                if value.ndim == 0:  # the step counter, equal for all parameters of a shard
                    yield "optimizer", f"{name}/{key}", value.clone()
                else:
                    yield "optimizer", f"{name}/{key}", ds_utils.safe_get_full_optimizer_state(parameter, key)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_moments(state, self.model)
        self._load_weights(state["model"])
        self._load_moments(state["optimizer"])
        self.skipped.fill_(state["scaler"].get("skipped", 0))
        if self.scaler.is_enabled():
            self.zero.load_loss_scale(state["scaler"])

    def _load_weights(self, files: TensorFiles) -> None:
        own = self.model.hf_state()
        check_names(own, files)
        for name, tensor in own.items():
            check_shape(name, files, tuple(getattr(tensor, "ds_shape", tensor.shape)))
            self.assign(tensor, self._own_rows(files, name, tensor))
        self.zero.update_weights()

    def _load_moments(self, files: TensorFiles) -> None:
        self.optimizer.state.clear()
        parameters = dict(self.model.hf_named_parameters())
        slots = [(slot, *slot.split("/", 1)) for slot in sorted(files.keys())]
        on_device = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        for slot, name, key in slots:
            shard = self.shards.shard_of(parameters[name])
            if key in self.optimizer.state[shard]:
                continue
            if files.shape(slot):
                value = torch.zeros_like(shard, requires_grad=False)
            else:  # the step counter, equal for all parameters of a shard
                value = files.read(slot).to(shard.device if on_device else "cpu", copy=True)
            self.optimizer.state[shard][key] = value
        self.zero.link_moments()
        for slot, name, key in slots:
            if files.shape(slot):
                self.assign(parameters[name], self._own_rows(files, slot, parameters[name]), key)

    # -- DeepSpeed's shards -------------------------------------------------------------------------------------------

    def whole(self, tensor: Tensor) -> Tensor:
        """Return the full fp32 weight that the optimizer updates; a buffer is returned as it is. This is a collective."""
        if not isinstance(tensor, nn.Parameter):
            return tensor
        if tensor.requires_grad:
            weight: Tensor = ds_utils.safe_get_full_fp32_param(tensor)
            return weight
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().float().clone()

    def _own_rows(self, files: TensorFiles, name: str, tensor: Tensor) -> Tensor:
        """Return the full weight or moment ``name`` of ``tensor``, of which only the rows with this rank's part are read. The
        others have undefined values, and no memory before they are written."""
        shape = files.shape(name)
        if not tensor.requires_grad or not shape or not (width := math.prod(shape[1:])):
            return files.read(name)
        first, stop = self.shards.own_range(tensor)
        start, stop = first // width, min(-(-stop // width), shape[0])
        full = torch.empty(shape, dtype=getattr(torch, files.dtype(name)))
        if start < stop:
            full[start:stop] = files.read(name, start, stop)
        return full

    @torch.no_grad()
    def assign(self, tensor: Tensor, value: Tensor, key: str | None = None) -> None:
        """Copy this rank's part of the full ``value`` of a weight, or of its moment ``key``, into the fp32 shard."""
        if not tensor.requires_grad:  # a buffer, a frozen weight
            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                tensor.copy_(value)
        elif self.zero.stage < 3:
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


def report_rounded(model: LanguageModel, precision: Precision) -> None:
    """Report the parameters that a model keeps in fp32 but ZeRO computes in 16 bits, since its flat shards have one dtype."""
    parameters = {name for name, _ in model.hf_named_parameters()}
    kept = sorted(kept_fp32(model.hf, precision.compute_dtype) & parameters)
    if kept:
        notice(
            f"strategy=deepspeed: {len(kept)} weights that the model requires in fp32 (e.g. {kept[0]}) are used in "
            f"{precision.compute}; strategy=ddp and strategy=fsdp with bf16-true keep them in fp32"
        )


def partition(model: LanguageModel, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Shard every weight over the devices, one at a time. The weight of the output head is registered as external, because
    the loss uses it outside of the head's module."""
    cast_parameters(model, dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=dtype)
    for parameter in model.hf.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


def padded_shard(value: Tensor, parameter: Any) -> Tensor:
    """Return this rank's shard of ``value`` in the layout of ZeRO-3: flattened, in equal parts, the last padded with zeros."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
    part = value.flatten()[rank * size : (rank + 1) * size].to(torch.float32)
    return nn.functional.pad(part, (0, size - part.numel()))
