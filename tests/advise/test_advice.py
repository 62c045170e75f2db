"""The recipe as a sentence, a command and an experiment, and the page."""

import json

import pytest
import yaml

from pretrain.advise.page import advice_page
from pretrain.advise.recipe import Prediction, Recipe
from pretrain.config.compose import run_config
from pretrain.telemetry.history import History
from pretrain.telemetry.report.predicted import predicted_table
from tests.advise.test_choices import chosen, run

RECIPE = Recipe(
    {"lr": 3e-4, "replay.share": 0.15, "max_steps": 200},
    {"objective": "kl_to_base"},
    ["lr 0.0003: a larger\nrate gains less."],
    {
        "es.biblia": Prediction("new", (-1.2, -1.3, -1.1), 200, "law"),
        "english": Prediction("base", (0.05, 0.02, 0.08), 200, "law"),
    },
    40,
)


def test_the_sentence_and_the_command():
    assert RECIPE.sentence() == (
        "Use objective kl_to_base, a peak learning rate of 0.0003, 15% old text and 200 steps: the model gains 1.20 (1.10 to "
        "1.30) nats per token on es.biblia and forgets 0.05 (0.02 to 0.08) nats per token on english after 200 steps."
    )
    words = ["dataset=local", "dataset.nameOrPath=a b/", "lr=1e-3", "batch_size=4"]
    assert RECIPE.command(words) == (
        "python -m pretrain dataset=local 'dataset.nameOrPath=a b/' batch_size=4 objective=kl_to_base lr=0.0003 "
        "replay.share=0.15 max_steps=200"
    )
    assert RECIPE.experiment_command(words, "my advice") == (
        "python -m pretrain dataset=local 'dataset.nameOrPath=a b/' batch_size=4 --config-dir 'my advice' experiment=advised"
    ), "words of the command line would win over the experiment"
    assert RECIPE.experiment_command(["experiment=means"], "x") is None
    better = Recipe({}, {}, [], {"english": Prediction("base", (-0.1, -0.2, 0.0), 8, "probe")})
    assert better.sentence().endswith("gains 0.10 (-0.00 to 0.20) nats per token on english in the 8 steps of a probe.")
    assert Recipe({}, {}, []).sentence() == "Use the command as it is."


def test_the_experiment_is_data_that_composes(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = RECIPE.yaml("python -m pretrain\nlr=1")
    (tmp_path / "experiment" / "advised.yaml").write_text(text)
    (tmp_path / "probes" / "lr=1").mkdir(parents=True)
    (tmp_path / "probes" / "lr=1" / "config.yaml").write_text("lr: 7\n")
    assert text.startswith("# @package _global_\n# Use objective kl_to_base")
    assert "# python -m pretrain lr=1\n" in text
    config = run_config(["experiment=advised", "batch_size=4"], str(tmp_path))
    assert (config.lr, config.replay.share, config.max_steps, config.batch_size) == (3e-4, 0.15, 200, 4)
    assert config.objective_identity["_target_"].endswith("KlToBase")
    assert config.advise.predicted["es.biblia"] == ["new", 200, -1.2, -1.3, -1.1]
    assert yaml.safe_load(text)["defaults"] == [{"override /objective": "kl_to_base"}]
    merged = Recipe({"merge.curve": [0, 0.5, 1], "merge.choose": "forgetting<=0.05"}, {"transform": ["lora"]}, [])
    (tmp_path / "experiment" / "advised.yaml").write_text(merged.yaml("x"))
    config = run_config(["experiment=advised"], str(tmp_path))
    assert (config.merge.choose, len(config.transforms)) == ("forgetting<=0.05", 1)
    assert run_config(merged.words).merge.curve == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("step", "measured", "word"), [(200, -1.25, "inside"), (200, -1.5, "outside"), (100, -1.2, "")]
)
def test_the_report_compares(step, measured, word):
    config = {"advise": {"predicted": {"es": ["new", 200, -1.2, -1.3, -1.1]}}}
    score = {"event": "evaluation", "time": 0.0, "domain": "es", "role": "new", "perplexity": 2.0, "tokens": 5}
    history = History([score | {"step": s, "loss": 7 + d, "delta_loss": d} for s, d in ((0, 0.0), (step, measured))])
    page = predicted_table(config, history)
    assert ("inside" in page, "outside" in page) == (word == "inside", word == "outside")
    assert ("not compared" in page) == (step != 200)
    assert predicted_table({}, history) == ""
    assert predicted_table({"advise": {"predicted": {"es": ["new", "<b>", 1]}}}, history) == ""


def test_the_page():
    found = chosen()
    probes = [run(lr, 0.1, gain, 0.1 * gain) for lr, gain in ((1e-4, 0.2), (1e-3, 0.8))]
    rows = [
        {"kind": "lr", "name": f"lr {one.probe.lr:g} <script>", "lr": one.probe.lr, "steps": 8, "gain": one.gain}
        | {"forgetting": one.forgetting, "cost": 0.01, "seconds": 3.0, "link": "probes/a b/report.html"}
        | {"losses": {name: {"steps": xs, "losses": ys} for name, (xs, ys) in one.losses.items()}}
        for one in probes
    ]
    advice = {
        "sentence": RECIPE.sentence(),
        "command": RECIPE.command([]),
        "reasons": RECIPE.reasons,
        "look": None,
        "predicted": {"es": {"role": "new", "change": -1.2, "low": -1.3, "high": -1.1, "steps": 8, "by": "probe"}},
        "budget": {"spent": 0.19, "share": 0.2, "allotment": {"steps": 8}},
        "rate": {"lr": 1e-3},
        "share": json.loads(json.dumps(found.record())),
        "checks": [{"role": "new", "from": 0.1, "to": 0.4, "predicted": 0.1, "measured": 0.2}],
        "length": {
            "lengths": [10, 20],
            "changes": {"es": [[-1, -2, 0], [-1.5, -2, -1]]},
            "refused": {"english": "too few"},
        }
        | {"extrapolation": 5.0},
        "batch": None,
        "means": [],
        "notes": ["Nothing."],
        "probes": rows,
    }
    page = advice_page(json.loads(json.dumps(advice)), title="Advice: x")
    for words in (
        "Use objective kl_to_base",
        "19.0 %",
        "Front of the shares",
        "by learning rate",
        "too few",
        "Nothing.",
    ):
        assert words in page, words
    assert "<script" not in page
    assert 'href="probes/a%20b/report.html"' in page
