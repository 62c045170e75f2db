"""The schema of a checkpoint. It is validated once before loading, so that the code that uses the content can rely on it.

`validation_error` checks the marker and the files, then state.json, then the headers of the weight files. It needs no
model, so a run can skip an invalid checkpoint before it has built anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError

from pretrain.checkpoint.config import Verify
from pretrain.checkpoint.marker import first_error, incomplete_reason
from pretrain.checkpoint.rng import check_rng_state
from pretrain.checkpoint.train_state import DERIVED, RENAMED, TrainState
from pretrain.distributed.packing import OF_RANK, name_of
from pretrain.distributed.sharding import TensorFiles
from pretrain.runtime.errors import UserError
from pretrain.runtime.folders import marked_files
from pretrain.runtime.strict_json import read_json

KINDS = ("model", "optimizer", "hook")  # of tensor files; `hook` are tensors of the run's hooks, by `<hook>/<key>`
MODEL_IDENTITY = re.compile(
    r"[0-9a-f]{16}( \{.*\})?", re.DOTALL
)  # the digest of a model, and its overrides if it has any
Count = Annotated[int, Field(ge=0, lt=2**63)]
Tensors = dict[str, tuple[str, list[Count]]]  # name → dtype and full shape


class _Part(BaseModel):
    """A part of state.json. Keys that later versions may add are ignored."""

    model_config = ConfigDict(strict=True, extra="allow")


class Taken(_Part):
    """The samples taken so far, in total and of each part of the training data."""

    samples: Count
    parts: dict[str, Count] = {}


class Cursor(Taken):
    """The state of the loader. ``origin`` is where the run went over to another mixture."""

    origin: Taken | None = None


class Scaler(_Part):
    """The state of torch's ``GradScaler`` or DeepSpeed's loss scaler. It has either all of its numbers or none."""

    skipped: Count = 0
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    growth_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    growth_interval: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    _growth_tracker: Count | None = None


class Guard(_Part):
    losses: list[float] = []
    skips_in_a_row: Count = 0
    passed_over: list[Count] = []


class MixturePhase(_Part):
    """The shares of the parts of the training data from a sample on."""

    first_sample: Count
    shares: dict[str, float]


class Identity(_Part):
    """What a checkpoint must have in common with the run that resumes from it."""

    model: str
    tokenizer: str
    data: str
    sequence_length: Annotated[int, Field(gt=0, lt=2**31)]
    global_batch: Annotated[int, Field(gt=0, lt=2**63)]
    seed: int
    weights: str
    optimizer: list[Any]
    objective: dict[str, Any] | None = None
    transforms: list[dict[str, Any]] = []
    mixture: list[MixturePhase] = []


class Score(_Part):
    domain: str
    role: str
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None


class Record(_Part):
    event: str
    step: Count


class Manifest(_Part):
    """Every tensor of the checkpoint, in all of its files."""

    model: Tensors
    optimizer: Tensors
    hook: Tensors = {}


class Owners(_Part):
    """The rank that has written a tensor in full, where several ranks have written full tensors."""

    model: dict[str, Count] = {}
    optimizer: dict[str, Count] = {}


class OptimizerValues(_Part):
    """The plain values in the optimizer's state, by ``<parameter>/<key>``, and those that training has changed in each of its
    parameter groups. ``layout`` is a digest of each rank's shards, if some of the state belongs to them."""

    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    layout: list[str] = []


class State(_Part):
    """The content of state.json. Checkpoints of format 3 have neither ``tensors`` nor ``ranks``. ``hooks`` holds the plain
    values of each hook's state."""

    progress: dict[str, Any]
    loader: Cursor
    rng: Annotated[list[dict[str, Any]], Field(min_length=1)]
    scaler: Scaler
    guard: Guard = Guard()
    identity: Identity
    records: list[Record] = []
    tensors: Manifest | None = None
    owners: Owners | None = None
    hooks: dict[str, dict[str, Any]] = {}
    optimizer_values: OptimizerValues | None = None
    ranks: Annotated[int, Field(gt=0)] | None = None


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json. Raises ``UserError`` if it is missing or invalid."""
    file = path / "state.json"
    try:
        state: dict[str, Any] = read_json(file)
        if isinstance(state, dict) and isinstance(progress := state.get("progress"), dict):
            state["progress"] = {RENAMED.get(key, key): value for key, value in progress.items()}
        check_state(state)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}") from None
    identity = state["identity"]
    if not MODEL_IDENTITY.fullmatch(identity["model"]):  # earlier versions wrote the model's name before the digest
        identity["model"] = identity["model"].rpartition(" ")[2]
    return state


def check_state(content: Any) -> None:
    """Raise ``ValueError`` if ``content`` is not the state of a run."""
    try:
        state = State.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise ValueError(first_error(error)) from None
    scaler = content["scaler"]
    numbers = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    if 0 < len(numbers & scaler.keys()) < len(numbers) or not isinstance(scaler.get("_growth_tracker", 0), int):
        raise ValueError("scaler: some of its numbers are missing")
    progress = _checked_progress(state.progress)
    if progress.samples != state.loader.samples:
        raise ValueError(f"loader is at sample {state.loader.samples}, progress at {progress.samples}")
    if state.ranks not in (None, len(state.rng)):
        raise ValueError(f"rng has the states of {len(state.rng)} processes, but {state.ranks} saved")
    for number, rng in enumerate(content["rng"]):
        try:
            check_rng_state(rng)
        except ValueError as error:
            raise ValueError(f"rng.{number}: {error}") from None


def _checked_progress(given: dict[str, Any]) -> TrainState:
    checks = _field_checks()
    if unknown := given.keys() - checks.keys():
        raise ValueError(f"progress: unknown key {min(unknown)!r}")
    if missing := {"step", "samples", "tokens"} - given.keys():
        raise ValueError(f"progress: no {min(missing)}")
    found: dict[str, Any] = {}
    for key, value in given.items():
        try:
            found[key] = checks[key].validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise ValueError(f"progress.{key}: {first_error(error)}") from None
    progress = TrainState()
    progress.load_state_dict(found)
    return progress


@cache
def _field_checks() -> dict[str, TypeAdapter[Any]]:
    """Return a validator for each field of `TrainState`, made from its type; counts must not be negative."""
    hints = get_type_hints(TrainState) | dict.fromkeys(("step", "samples", "tokens"), Count) | {"scores": list[Score]}
    types = {f.name: hints[f.name] for f in fields(TrainState)} | DERIVED
    return {name: TypeAdapter(hint) for name, hint in types.items()}


def validation_error(path: Path, *, verify: Verify = "size") -> str | None:
    """Return why a checkpoint can't be loaded, or ``None``: it is incomplete, or a run of this program did not save it."""
    if reason := incomplete_reason(path, verify=verify):
        return reason
    try:
        state = read_state(path)
        check_folder_name(path, state["progress"]["step"])
        found = {kind: tensor_files(path, kind) for kind in KINDS}
        check_tensors(found, state)
    except (UserError, ValueError, SafetensorError) as error:
        return str(error).removeprefix(f"{path}/")
    return None


def check_folder_name(path: Path, step: int) -> None:
    """Raise ``ValueError`` if the folder's name is that of another step."""
    number = path.name.removeprefix("step-")
    if number != path.name and number.isdecimal() and int(number) != step:
        raise ValueError(f"state.json belongs to step {step}")


def tensor_files(
    path: Path,
    kind: str,
    described: Tensors | None = None,
    owners: Mapping[str, int] | None = None,
    *,
    share: slice = slice(None),
) -> TensorFiles:
    """Return the tensors of ``kind`` in a checkpoint, without reading them, or those in a ``share`` of its files, which are
    ordered by rank. With ``described`` from state.json, a file is opened when it is needed; ``owners`` are ranks by tensor.

    Raises ``UserError`` if its files do not make full tensors, see `TensorFiles`.
    """
    names = sorted(marked_files(path, f"{kind}*.safetensors"), key=lambda name: (_rank_of(name), name))
    places = {_rank_of(name): place for place, name in enumerate(names)}
    of_rank = {name: int(found[1]) for name in described or () if (found := OF_RANK.fullmatch(name))}
    known = {name: places[rank] for name, rank in (of_rank | dict(owners or {})).items() if rank in places}
    return TensorFiles([path / name for name in names[share]], described, known)


def _rank_of(name: str) -> int:
    """Return the rank that has written the tensor file ``name``; 0 if one rank has written all."""
    found = re.search(r"\.rank-(\d{1,9})\.safetensors$", name)
    return int(found[1]) if found else 0


def check_tensors(found: dict[str, TensorFiles], state: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the files hold other tensors than were saved. Checkpoints of format 3 have no list of them, so
    only the necessary ones are checked: weights, and moments for them once a step has been trained."""
    weights = found["model"].keys()
    if not weights:
        raise ValueError("no weights")
    manifest = state.get("tensors")
    if manifest is not None:
        for kind in KINDS:
            _compare(kind, manifest.get(kind, {}), found[kind])
    elif not found["optimizer"].keys() and state["progress"]["step"] > state["scaler"].get("skipped", 0):
        raise ValueError(f"no optimizer state, after {state['progress']['step']} steps")
    check_optimizer_names(found["optimizer"].keys(), weights, state)


def check_optimizer_names(slots: Iterable[str], weights: Container[str], state: dict[str, Any]) -> None:
    """Raise ``ValueError`` if optimizer state, the tensors ``slots`` or a plain value, belongs to none of the ``weights``."""
    for slot in sorted({*slots, *(state.get("optimizer_values") or {}).get("state", {})}):
        parameter, _, key = name_of(slot).partition("/")
        if not key or parameter not in weights:
            raise ValueError(f"optimizer state {slot!r} belongs to no weight")


def _compare(kind: str, saved: dict[str, Any], files: TensorFiles) -> None:
    if difference := sorted(saved.keys() ^ files.keys()):
        raise ValueError(f"{kind}: {difference[0]!r} {'is missing' if difference[0] in saved else 'was not saved'}")
    for name, (kind_of_number, shape) in saved.items():
        actual = [files.dtype(name), list(files.shape(name))]
        if actual != [kind_of_number, shape]:
            raise ValueError(f"{kind}: {name} is {actual[0]} {actual[1]}, {kind_of_number} {shape} was saved")
