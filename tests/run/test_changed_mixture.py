"""A run that is resumed with another mixture: refused, or each part continues behind what was read of it."""

import json
import shutil

from pretrain.telemetry.sinks.jsonl import read_records
from tests.runs import losses, starts


def data_of(run):
    return [record for record in read_records(run / "metrics.jsonl") if record["event"] == "data"]


def state_of(run, step):
    return json.loads((run / f"checkpoints/step-{step:08}/state.json").read_text())


def test_replay_is_added_to_a_run_which_is_then_resumed_exactly(base_arguments, command, tmp_path):
    plain = tmp_path / "plain"
    words = [*base_arguments, f"output_dir={plain}", "evaluate_every=null", "checkpoint.keep_last=null"]
    assert command([*words, "max_steps=10"])[0] == 0
    (name,) = data_of(plain)[-1]["parts"]
    assert state_of(plain, 10)["loader"] == {"samples": 40, "parts": {name: 40}}

    replayed = [*words, "max_steps=20", "replay.share=0.25"]
    code, _, err = command(replayed)
    assert code == 2
    assert "replay.share: 0.0 → 0.25" in err
    assert "resume_allow=[data]" in err

    code, _, err = command([*replayed, "resume_allow=[data]"])
    assert code == 0, err
    assert len(json.loads((plain / "tokens.json").read_text())) == 2, "of the new and of the old text"
    parts = data_of(plain)[-1]["parts"]
    assert {key: part["tokens"] for key, part in parts.items()} == {name: 70 * 32, "replay": 10 * 32}
    assert parts["replay"]["share"] == 10 / 80
    loader = state_of(plain, 20)["loader"]
    assert loader["parts"] == {name: 70, "replay": 10}
    assert loader["origin"] == {"samples": 40, "parts": {name: 40}}

    run = tmp_path / "run"
    shutil.copytree(plain, run)
    shutil.rmtree(run / "checkpoints/step-00000020")
    words = [word.replace(str(plain), str(run)) for word in replayed]
    code, _, err = command(words)
    assert code == 0, err
    assert starts(run)[-1] == (15, True), "from a checkpoint after the change, without resume_allow"
    assert losses(run) == losses(plain)
    assert state_of(run, 20)["loader"] == loader
