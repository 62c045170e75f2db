"""report.html is one page without network or script, says the truth in a sentence, and survives a resume."""

import re

from pretrain.events import RunStarted
from pretrain.telemetry.report.page import verdict
from pretrain.telemetry.report.sink import Report


def evaluation(step, domain, role, loss, delta):
    numbers = {"loss": loss, "perplexity": 9.0, "bits_per_byte": None, "tokens": 5, "delta_loss": delta}
    return {"event": "evaluation", "step": step, "time": 0.0, "domain": domain, "role": role} | numbers


def train(step, loss):
    numbers = {"epoch": 0.1, "tokens": 10 * step, "loss": loss, "lr": 1e-3, "tokens_per_second": 100.0}
    return {"event": "train", "step": step, "time": 0.0} | numbers


def test_page(tmp_path):
    report = Report()
    report.open(tmp_path, RunStarted(0, 3, resumed=False))
    records = [
        {"event": "run_started", "step": 0, "time": 0.0, "total_steps": 3, "name": "<b>mine</b>"},
        evaluation(0, "python", "new", 3.0, 0.0),
        *(train(step, None if step == 2 else 2.5) for step in (1, 2, 3)),
        evaluation(3, "python", "new", 2.5, -0.5),
        {"event": "run_finished", "step": 3, "time": 0.0, "status": "finished"},
    ]
    for record in records:
        report.write(record)
    text = (tmp_path / "report.html").read_text()
    assert "The model learned python (0.500 nats per token)." in text
    assert "&lt;b&gt;mine" in text
    assert "<b>mine" not in text
    assert text.count("<svg") == 4
    assert "<script" not in text
    outside = [u for u in re.findall(r"https?://[^\"' )]+", text) if "www.w3.org" not in u]
    assert not outside, "nothing is loaded from elsewhere (SVG's own names are not loads)"
    assert len(text) < 2_000_000


def test_verdict_names_gain_and_forgetting():
    domains = {
        "law": [evaluation(9, "law", "new", 2.0, -0.25)],
        "english": [evaluation(9, "english", "base", 3.0, 0.125)],
        "code": [evaluation(9, "code", "base", 3.0, -0.5)],
    }
    assert verdict(domains) == (
        "The model learned law (0.250 nats per token) and forgot english (0.125 nats per token) "
        "and improved on code (0.500 nats per token)."
    )
