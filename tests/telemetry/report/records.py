"""The records of a run that had everything happen to it, made up."""

import json
import math
from pathlib import Path

SCRIPT = "</script><script>alert(1)</script>"


def evaluation(step, domain, role, loss, delta):
    numbers = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 2.5,
        "tokens": 5,
        "delta_loss": delta,
    }
    return {"event": "evaluation", "step": step, "time": float(step), "domain": domain, "role": role} | numbers


def train(step, *, window=1, skipped=0):
    """A record of ``window`` steps, of a second each: 0.1 s data, 0.6 s compute, 0.2 s optimizer, 0.05 s communication."""
    loss = 3 + 2 * math.exp(-step / 300) + 0.1 * math.sin(step)
    seconds = {"step": 1.0, "data": 0.1, "compute": 0.6, "optimizer": 0.2, "communication": 0.05}
    seconds |= {"evaluation": 0.5 * window if step % 100 == 0 else 0.0, "checkpoint": 0.25 * window}
    numbers = {"epoch": 0.1, "tokens": 2048 * step, "loss": loss, "loss_mean": loss, "lr": 1e-3 * (1 - step / 1e6)}
    numbers |= {
        "grad_norm": 1 + 0.3 * math.cos(step),
        "tokens_per_second": 2048.0 + step % 7,
        "mfu": 0.4,
        "goodput": 0.9,
    }
    numbers |= {"memory_gib": 20.5, "memory_reserved_gib": 22.0, "host_memory_gib": 3.5, "skipped_steps": skipped}
    numbers |= {"eta_seconds": 3700.0, "loss_scale": None}
    return (
        {"event": "train", "step": step, "time": float(step)}
        | {f"{k}_seconds": v for k, v in seconds.items()}
        | numbers
    )


def started(step=0, *, resumed=False, total=400, **facts):
    what = {"name": "law-llama", "model": "llama", "parameters": 1_236_000_000, "strategy": "fsdp", "world_size": 8}
    what |= {
        "precision": "bf16-mixed",
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {"python": "3.12", "torch": "2.9"},
    }
    what |= {"peak_flops": 989e12, "flops_per_token": 7.4e9}
    head = {"event": "run_started", "step": step, "time": float(step), "total_steps": total, "resumed": resumed}
    return head | what | facts


def sample(step, text, prompt="The court"):
    return {
        "event": "sample",
        "step": step,
        "time": float(step),
        "domain": "law",
        "role": "new",
        "prompt": prompt,
        "text": text,
    }


def layers(step):
    numbers = {"weight_norm": 20.0, "grad_norm": 0.3, "update_norm": 0.02, "update_ratio": 1e-3}
    found = {
        f"layers.{i}": {k: v * (1 + i) * (1 + 0.2 * math.sin(step * i)) for k, v in numbers.items()} for i in range(12)
    }
    return {"event": "layers", "step": step, "time": float(step), "layers": found}


def eventful(steps=400):
    """Two domains, every kind of record, a resume and a rollback, and text that would be a script."""
    yield started(total=steps)
    yield evaluation(0, "law", "new", 3.0, 0.0)
    yield evaluation(0, "english", "base", 2.5, 0.0)
    yield sample(0, " is a place where kings play tennis.")
    yield sample(0, f" opens {SCRIPT}", prompt=f"<b>{SCRIPT}")
    for step in range(1, steps + 1):
        yield train(step, skipped=int(step > 120))
        if step % 20 == 0:
            yield layers(step)
        if step % 100 == 0:
            gain = 1 - math.exp(-step / 150)
            yield evaluation(step, "law", "new", 3.0 - gain, -gain)
            yield evaluation(step, "english", "base", 2.5 + 0.3 * gain, 0.3 * gain)
            yield sample(step, f" held at step {step} that the appeal is dismissed with costs.")
            yield sample(step, f" closes {SCRIPT}", prompt=f"<b>{SCRIPT}")
            sources = {"judgments": {"tokens": 1500 * step, "documents": 3 * step, "share": 0.75}}
            sources["statutes"] = {"tokens": 500 * step, "documents": step, "share": 0.25}
            yield {"event": "data", "step": step, "time": float(step), "tokens_per_document": 500.0, "sources": sources}
            where = {
                "path": f"runs/law/checkpoints/step-{step:08}",
                "seconds": 2.5,
                "blocked_seconds": 0.02,
                "bytes": 14_800_000_000,
            }
            yield {"event": "checkpoint", "step": step, "time": float(step)} | where
        if step == 150:
            yield started(step, resumed=True, total=steps)
        if step == 250:
            yield {"event": "rollback", "step": 250, "time": 260.0, "bad_step": 262, "reason": "spike"}
    end = {
        "status": "finished",
        "tokens": 2048 * steps,
        "train_seconds": 400.0,
        "tokens_per_second": 2050.0,
        "goodput": 0.91,
    }
    yield {"event": "run_finished", "step": steps, "time": float(steps)} | end


def write_run(folder: Path, records) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return folder
