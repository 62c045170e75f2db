"""Sweep folders made by hand, for what only reads them."""

import json

import pytest

from pretrain.sweep.job import job_of


@pytest.fixture
def fabricate(tmp_path):
    """``fabricate(*overrides, …) -> Job``: a job as a sweep leaves one, swept over lr and strategy. ``new``, ``base``:
    (loss, change of the loss) of the domains; ``evaluated``: its records, (step, domain, role, change)."""

    def make(*overrides, status="finished", new=None, base=None, speed=1000.0, error=None, evaluated=()):
        job = job_of(tmp_path / "sweep", list(overrides), ("lr", "strategy"))
        code = {"finished": 0, "failed": 2, "stopped": 75, "pruned": 75}.get(status)
        job.write(status=status, exit_code=code, error=error, seconds=61.0)
        roles = {"books": ("new", new), "old": ("base", base)}
        results = {d: {"role": r, "loss": s[0], "delta_loss": s[1]} for d, (r, s) in roles.items() if s}
        if results:
            (job.folder / "run.json").write_text(json.dumps({"status": status, "results": results}))
        records = [{"event": "train", "step": 9, "loss": 5.0, "tokens_per_second": 1.0}]
        fields = ("step", "domain", "role", "delta_loss")
        records += [{"event": "evaluation", **dict(zip(fields, values, strict=True))} for values in evaluated]
        records += [{"event": "run_finished", "step": 9, "tokens_per_second": speed}]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return job

    return make
