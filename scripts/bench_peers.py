"""What `bench_gpu.py` measures this program against: one peer, one size, in a process of its own.

    python scripts/bench_peers.py bare|trainer|titan SIZE STEPS [--compile]

SIZE is a JSON object, the fields of `bench_gpu.Size`. Random tokens, bf16 products, fp32 weights, fused AdamW, clipping. The
device is waited for once in five steps. Prints one JSON line: the seconds of each five steps, the peak in GiB, and when the last
step ended.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW = 5
LR, CLIP = 1e-4, 1.0


class Clock:
    """Takes the time after every five steps."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._steps, self._last = 0, time.perf_counter()

    def tick(self) -> None:
        self._steps += 1
        if self._steps % WINDOW == 0:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.times.append(now - self._last)
            self._last = now

    def report(self) -> None:
        """Print the result and leave the process at once, without what libraries do at their end."""
        peak = (
            torch.cuda.max_memory_allocated()
            if DEVICE == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        print(json.dumps({"times": self.times, "peak_gib": peak / 2**30, "finished_at": time.time()}), flush=True)
        os._exit(0)


def llama(size: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size["width"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        vocab_size=size["vocabulary"],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()


def random_rows(size: dict[str, int], rows: int) -> torch.Tensor:
    """Return token ids, int64 [rows, length + 1]."""
    return torch.randint(
        size["vocabulary"] - 300, (rows, size["length"] + 1), generator=torch.Generator().manual_seed(0)
    )


def bare(size: dict[str, int], steps: int, *, compiled: bool) -> None:
    """The loop that everybody writes."""
    model = llama(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    forward = torch.compile(model, dynamic=False) if compiled else model
    data, clock = random_rows(size, steps * size["batch"]), Clock()
    for step in range(steps):
        rows = data[step * size["batch"] : (step + 1) * size["batch"]].to(DEVICE)
        ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = forward(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick()
    clock.report()


def trainer(size: dict[str, int], steps: int, *, compiled: bool) -> None:
    """The Hugging Face Trainer with the same settings."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = Clock()

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    settings = TrainingArguments(
        output_dir="trainer",
        per_device_train_batch_size=size["batch"],
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        bf16=True,
        torch_compile=compiled,
        use_cpu=DEVICE == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in random_rows(size, steps * size["batch"])]
    Trainer(llama(size), settings, train_dataset=rows, callbacks=[Ticks()]).train()
    clock.report()


class RandomData:
    """A loader of torchtitan: the rows of ``data``, ids [rows, length + 1], in batches."""

    def __init__(self, data: torch.Tensor, batch: int) -> None:
        self.batches = data.split(batch)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for rows in self.batches:
            yield {"input": rows[:, :-1].contiguous()}, rows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def titan(size: dict[str, int], steps: int, *, compiled: bool) -> None:
    """torchtitan 0.2.2 in one process, with a Llama 3 of this shape registered as a flavor and random tokens as its data."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    }
    import torchtitan.models.llama3 as family
    import torchtitan.train as program
    from torchtitan.config import ConfigManager
    from torchtitan.models.llama3.model.args import TransformerModelArgs

    family.llama3_args["bench"] = TransformerModelArgs(
        dim=size["width"],
        n_layers=size["layers"],
        n_heads=size["heads"],
        n_kv_heads=size["kv_heads"],
        vocab_size=size["vocabulary"],
        multiple_of=size["ffn"],  # its feed-forward width is rounded up to a multiple of this
        rope_theta=10000,
    )
    data = RandomData(random_rows(size, (steps + 1) * size["batch"]), size["batch"])
    spec = family.get_train_spec()
    spec.build_dataloader_fn, spec.build_tokenizer_fn = (lambda **_: data), None
    program.train_spec_module.get_train_spec = lambda name: spec
    words = [
        *("--model.name", "llama3", "--model.flavor", "bench", "--training.local_batch_size", str(size["batch"])),
        *("--training.seq_len", str(size["length"]), "--training.steps", str(steps), "--metrics.log_freq", str(WINDOW)),
        *("--checkpoint.no-enable", "--activation_checkpoint.mode", "none", "--optimizer.implementation", "fused"),
        *("--lr_scheduler.warmup_steps", "2", *(["--compile.enable"] if compiled else [])),
    ]
    run = program.Trainer(ConfigManager().parse_args(words))
    clock, step = Clock(), run.train_step

    def counted(*args: Any) -> Any:
        out = step(*args)
        clock.tick()
        return out

    run.train_step = counted
    run.train()
    clock.report()


PEERS: dict[str, Callable[..., None]] = {"bare": bare, "trainer": trainer, "titan": titan}

if __name__ == "__main__":
    who, given, count, *options = sys.argv[1:]
    torch.backends.cuda.matmul.allow_tf32 = True
    PEERS[who](json.loads(given), int(count), compiled="--compile" in options)
