"""Read the results of a run from its folder: the numbers by which the jobs of a sweep are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.runtime.lines import json_lines
from pretrain.sweep.config import RUN_METRICS, TASK_METRIC
from pretrain.telemetry.history import History, domain_metrics
from pretrain.telemetry.numbers import is_number
from pretrain.telemetry.record import change_of, metric_key
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import is_record, tail

DECIMALS = (
    4  # of nats per token: strategies agree to more decimals, and a smaller difference between two jobs does not count
)


def measures_of(run: Path) -> dict[str, Any]:
    """Return the metrics of a run (see `History.metrics`), read from run.json and the last records, because metrics.jsonl can be
    long; a number that the run does not have is ``None``."""
    last_records = History(tail(run / "metrics.jsonl"), on_invalid=lambda number, error: None)
    facts = read_run_file(run)
    return last_records.metrics(facts.get("results") or {}, facts.get("metrics") or {})


def objectives(run: Path, metric: str) -> dict[int, float]:
    """Return ``metric`` at every evaluation so far, by step. Step 0 is left out, because it is the same in every run.

    The result is empty for a metric that evaluations do not measure.
    """
    by_step: dict[int, dict[str, Any]] = {}
    if metric.startswith(TASK_METRIC):
        found = records_of(run / "metrics.jsonl", "metric")
        own = (r for r in found if "name" in r and f"{TASK_METRIC}{metric_key(r)}" == metric)
        return {r["step"]: r["value"] for r in own if r["step"] and is_number(r.get("value"))}
    for record in records_of(run / "metrics.jsonl", "evaluation"):
        by_step.setdefault(record["step"], {})[record["domain"]] = record
    domains = len(by_step.pop(0, {}))
    complete = {step: results for step, results in by_step.items() if len(results) == domains}
    values = {step: objective_in(domain_metrics(results), metric) for step, results in complete.items()}
    return {step: value for step, value in values.items() if value is not None}


def objective_in(measures: dict[str, Any], metric: str) -> float | None:
    """Return the value of ``metric`` (see conf/sweep/default.yaml), or ``None`` if the run does not have it."""
    domain, _, field = metric.rpartition(".")
    if metric in RUN_METRICS or metric.startswith(TASK_METRIC):
        of_the_run: float | None = measures.get(metric)
        return of_the_run
    scores = measures["results"].get(domain, {})
    value: float | None = change_of(scores) if field == "delta_loss" else scores.get(field)
    return value


def records_of(file: Path, event: str) -> list[dict[str, Any]]:
    """Return the ``evaluation`` or ``metric`` records of a metrics.jsonl without parsing its other records."""
    quoted = b'"%s"' % event.encode()
    try:
        with file.open("rb") as lines:
            found = [*json_lines(line for line in lines if quoted in line)]
    except OSError:
        return []
    return [r for _, r in found if is_record(r) and r.get("event") == event and "domain" in r]


def ranking(rows: list[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    """Return the finished jobs that have an objective, the best first."""
    judged = [row for row in rows if row["status"] == "finished" and row["objective"] is not None]
    return sorted(judged, key=lambda row: row["objective"], reverse=direction == "maximize")


def pareto(rows: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the jobs on the Pareto front of gain and forgetting, the largest gain first."""
    points = [
        (round(row["new_delta"], DECIMALS), round(row["forgetting"], DECIMALS), row["number"])
        for row in rows
        if row["status"] == "finished" and row["new_delta"] is not None and row["forgetting"] is not None
    ]
    front = [
        point
        for point in points
        if not any(o[0] <= point[0] and o[1] <= point[1] and o[:2] != point[:2] for o in points)
    ]
    return [number for _, _, number in sorted(front)]
