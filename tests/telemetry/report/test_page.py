"""The page about a run: one file without network or script, which says the truth in a sentence and then in pictures."""

import re
import shutil
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from pretrain.config.check import conf_dir
from pretrain.config.defaults import defaults_for
from pretrain.telemetry.history import Domain, History
from pretrain.telemetry.numbers import duration
from pretrain.telemetry.report.compare import compare_page, names_of
from pretrain.telemetry.report.config_diff import differing
from pretrain.telemetry.report.folder import Run, read_run
from pretrain.telemetry.report.page import run_page
from pretrain.telemetry.report.summary import verdict
from tests.telemetry.report.records import SCRIPT, evaluation, eventful, started, train, write_run


def page(records):
    return run_page(Run("mine", History(records)))


@pytest.fixture(scope="module")
def eventful_page():
    return page(eventful())


def headings(text):
    return re.findall(r"<h2>([^<]+)</h2>", text)


def charts(text):
    return re.findall(r"<figcaption>([^<]+?) ?<", text)


def test_everything_that_is_known_is_shown(eventful_page):
    learned, went = ["Learning and forgetting", "Samples"], ["Training and speed", "Data seen", "Norms by layer"]
    assert headings(eventful_page) == [*learned, *went, "Faults and resumes", "Checkpoints", "Environment"]
    assert charts(eventful_page) == [
        *("Loss", "Gain and forgetting", "Time by part, from the first step to the last record"),
        *(
            "Learning rate",
            "Gradient norm",
            "Steps without an update",
            "Throughput",
            "Time by part",
            "MFU",
            "Memory",
        ),
        *("Tokens by source", "Update / weight", "Gradient norm", "Weight norm"),
    ]
    for said in (
        "held at step 400",
        "is a place where kings",
        "1 resume, 1 rollback",
        "rolled back from step 262: spike",
    ):
        assert said in eventful_page
    assert "held at step 300" not in eventful_page, "of the samples the first and the last"
    assert "compute 4 min, 48 %" in eventful_page
    assert "checkpoints/step-00000400" in eventful_page
    assert "14.8 GB" in eventful_page


def test_a_larger_vocabulary_is_said_to_have_other_tokens():
    config = {"transform": {"vocabulary": {"size": 10}}}
    found = [run_page(Run("mine", History(eventful()), config=own)) for own in ({}, config)]
    assert ["compare bits per byte" in text for text in found] == [False, True]


def test_nothing_is_loaded_and_nothing_can_run(eventful_page):
    assert SCRIPT not in eventful_page
    assert eventful_page.count("&lt;script&gt;alert(1)") == 3, "a prompt and two texts"
    assert "<script" not in eventful_page
    assert "default-src 'none'" in eventful_page
    outside = [u for u in re.findall(r"https?://[^\"' )]+", eventful_page) if "www.w3.org" not in u]
    assert not outside, "SVG's own names are not loads"
    loads = re.findall(r"(?:src|href)=\"([^\"#][^\"]{0,20})", eventful_page)
    assert all(load.startswith("data:image/") for load in loads)


def test_a_long_run_is_a_small_page():
    text = page([started(total=20_000), *(train(step) for step in range(1, 20_001))])
    assert len(text.encode()) < 1_000_000
    assert "points of 20,000 records: each is the mean of 64 records" in text


def test_a_run_of_before(eventful_page):
    """The fields of the first records there were."""
    numbers = {
        "tokens": 9,
        "loss": 2.5,
        "lr": 1e-3,
        "step_seconds": 1.0,
        "data_seconds": 0.5,
        "tokens_per_second": 100.0,
    }
    records = [
        {"event": "train", "step": s, "time": 0.0} | numbers | ({"loss": None} if s == 2 else {}) for s in (1, 2, 3)
    ]
    text = page([{"event": "run_started", "step": 0, "time": 0.0, "name": "old"}, *records])
    assert charts(text)[0] == "Loss"
    assert "steps 1.5 s, 50 %" in text, "what is not known of a step is not called other"
    assert "Nothing has been scored yet." in text


def test_a_run_that_has_just_begun():
    assert "running" in page([started()])
    assert "Nothing has been scored yet." in page([])


def test_how_a_run_ended():
    def status(records, **facts):
        return Run("r", History(records), facts).status

    stopped = {"event": "run_finished", "step": 1, "time": 0.0, "status": "stopped"}
    assert status([started(), stopped]) == "stopped"
    assert status([started(), stopped, started(1, resumed=True)]) == "running"
    assert status([started()], status="failed") == "failed"


def test_quarantined_batches_are_named(tmp_path):
    run = Run("r", History([started()]), quarantine=[{"step": 7, "time": 1.0, "reason": "nonfinite", "documents": []}])
    run.quarantine[0]["documents"] = [{"path": f"{name}.txt", "index": 3} for name in "abcde"]
    text = run_page(run)
    assert "1 quarantined batch" in text
    assert "quarantined (nonfinite): a.txt#3, b.txt#3, c.txt#3 and 2 more" in text


def test_verdict_names_gain_and_forgetting():
    def domain(role, delta):
        first, last = evaluation(0, "d", role, 3.0, 0.0), evaluation(9, "d", role, 3.0 + (delta or 0), delta)
        return Domain(role, first, last)

    domains = {"law": domain("new", -0.25), "english": domain("base", 0.125), "code": domain("base", -0.5)}
    assert verdict(domains) == (
        "The model learned some of law (perplexity 20.09 → 15.64, −0.250 nats per token), forgot some of english (perplexity "
        "20.09 → 22.76, +0.125 nats per token) and improved on code (perplexity 20.09 → 12.18, −0.500 nats per token)."
    )
    assert verdict({"law": domain("new", 0.25)}).startswith("The model lost on law")
    assert verdict({"english": domain("base", 0.004)}).startswith("The model kept english")
    assert verdict({"late": domain("base", None)}) == "No change is known yet."


@pytest.mark.parametrize(
    ("role", "delta", "words"),
    [
        ("base", 0.004, "kept d"),
        ("base", 0.0206, "forgot a little of d"),  # perplexity 48 → 49
        ("base", 0.1, "forgot some of d"),
        ("base", 0.5, "forgot much of d"),
        ("base", 1.593, "forgot most of d"),  # 48 → 236
        ("base", -0.01, "improved a little on d"),
        ("base", -1.2, "improved a lot on d"),
        ("new", -0.02, "learned a little of d"),
        ("new", -0.2, "learned some of d"),
        ("new", -0.4, "learned d"),
        ("new", -1.4, "learned a lot of d"),
        ("new", 0.01, "lost a little on d"),
        ("new", 0.1, "lost on d"),
        ("new", 2.0, "lost a lot on d"),
    ],
)
def test_the_words_of_the_verdict_follow_the_size_of_the_change(role, delta, words):
    before, after = evaluation(0, "d", role, 3.87, 0.0), evaluation(9, "d", role, 3.87 + delta, delta)
    assert verdict(History([before, after]).domains, 9).startswith(f"The model {words} (perplexity 47.94 → ")


def test_what_was_not_scored_since_step_0_is_said_so():
    """It was shown as the perplexity after the run, with a change of 0.0000."""
    text = page([started(), evaluation(0, "law", "new", 3.0, 0.0), train(1), train(2)])
    assert "Before this run the model had a perplexity of 20.09 on law; it has not been scored since." in text
    assert "<td>20.09</td><td>—</td>" in text
    assert "not scored since step 0</span>" in text
    assert "0.0000" not in text
    assert "perplexity of law (new) before this run" in text


def test_a_change_that_is_not_known_has_its_reason():
    """The run was resumed with other text of the base domain; its step 0 is not what `before` means any more."""
    reason = {"delta_reason": "step 0 was scored with other text", "digest": "b"}
    records = [
        evaluation(0, "old", "base", 3.0, 0.0) | {"digest": "a"},
        evaluation(9, "old", "base", 2.0, None) | reason,
    ]
    text = page([started(), *records])
    assert "The change on old is not known: step 0 was scored with other text." in text
    assert "20.09" not in text, "of the other text"
    assert "— → 7.4" in text
    known = evaluation(12, "old", "base", 2.0, 0.25) | {"digest": "b"}
    text = page([started(), *records, known])
    assert "forgot some of old (perplexity 5.75 → 7.39, +0.250 nats per token)" in text


def test_a_model_that_was_only_scored():
    text = page([started(total=0), evaluation(0, "law", "new", 3.0, None), evaluation(0, "english", "base", 2.0, None)])
    assert "The model has a perplexity of 20.09 on law and 7.39 on english." in text
    assert "→" not in text
    assert charts(text) == ["Loss"]


def test_durations():
    seconds = {
        0.004: "4 ms",
        8.44: "8.4 s",
        75: "75 s",
        720: "12 min",
        11_100: "3 h 05 min",
        187_300: "2 d 4 h",
        None: "—",
    }
    assert {s: duration(s) for s in seconds} == seconds


# What the run was told --------------------------------------------------------------------------------------------------


def composed(*overrides):
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", overrides=[*overrides, "name=x"]), resolve=True)


def changes(*overrides):
    config = composed(*overrides)
    return dict(differing([defaults_for(config), config]))


def test_the_defaults_do_not_differ_from_themselves():
    assert changes() == {}


def test_a_choice_is_listed_once_and_what_follows_it_is_not():
    assert changes("lr=3e-4", "output_dir=elsewhere") == {"lr": ["auto", "0.0003"]}
    assert changes("optimizer.lr=3e-4") == {"optimizer.lr": ["auto", "0.0003"]}
    found = changes("strategy=ddp", "evaluate_every=null")
    assert found["evaluate_every"] == ["100", "null"]
    assert [value.rpartition(".")[2] for value in found["strategy._target_"]] == ["Single", "Ddp"]
    assert all(key == "evaluate_every" or key.startswith("strategy.") for key in found)


@pytest.mark.parametrize(
    "config",
    [
        {"lr": "${oc.env:NOT_YOURS}"},
        {"lr": "${oc.env:NOT_YOURS", "name": "${nothing}"},
        {"resume_allow": ["${oc.env:NOT_YOURS}"], "seed": {"a": "${oc.env:NOT_YOURS}"}},
    ],
)
def test_a_stranger_s_configuration_reads_nothing(config, monkeypatch):
    monkeypatch.setenv("NOT_YOURS", "the-secret")
    assert defaults_for(config) == defaults_for({})


def test_composing_leaves_hydra_as_it_is():
    """A run that was started through Hydra writes its page inside of it."""
    config = composed()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        defaults_for(config)
        assert GlobalHydra.instance().hydra is before
        assert hydra.compose("config", overrides=["lr=2"]).lr == 2
    defaults_for(config)
    assert not GlobalHydra.instance().is_initialized()


# Several runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    folders = [write_run(tmp_path / name, eventful(100 * (i + 1))) for i, name in enumerate(("a/run", "b/run"))]
    for folder, lr in zip(folders, ("1e-3", "3e-4"), strict=True):
        OmegaConf.save(OmegaConf.create(composed(f"lr={lr}", f"output_dir={folder}")), folder / "config.yaml")
    return folders


def test_side_by_side(runs):
    names = names_of(runs)
    assert names == ["a/run", "b/run"]
    text = compare_page([read_run(run) for run in runs], names)
    assert {"Training loss", "Gain against forgetting", "Change on law (new)", "Throughput"} <= set(charts(text))
    rows = re.findall(r"<tr><td class=\"text\">(\w[\w.]*)</td>", text)
    assert rows == ["optimizer.lr", "lr"], "both follow from one choice, and stand in both config.yaml"
    results = text.partition("<h2>Results</h2>")[2]
    assert results.index("b/run") < results.index("a/run"), "the larger gain first"
    assert re.search(r"--c1\)\">b/run</span></td>", text), "in its colour"


def test_runs_without_a_configuration_are_compared_too(runs):
    shutil.rmtree(runs[0].parent)
    write_run(runs[0], eventful(100))
    assert "Differences of the configurations" not in headings(
        compare_page([read_run(run) for run in runs], ["a", "b"])
    )


def test_names_are_as_short_as_they_can_be():
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names_of([Path("/x/a")]) == ["a"]


MIXTURE = [{"step": 0, "shares": {"es": 0.75, "code": 0.25}}, {"step": 300, "shares": {"es": 1.0, "code": 0.0}}]


def test_the_parts_and_the_phases_of_a_mixture():
    part = {"tokens": 1234, "share": 0.755, "wanted": 0.75, "epochs": 1.5}
    data = {
        "event": "data",
        "step": 400,
        "time": 1.0,
        "sources": {"es/a.txt": {"tokens": 9, "documents": 1, "share": 1}},
    }
    records = [started(mixture=MIXTURE), train(100), train(400), data | {"parts": {"es": part, "code": part}}]
    text = page(records)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    assert cells[cells.index("es") : cells.index("es") + 5] == ["es", "1.23k", "75.5 %", "75.0 %", "1.50"]
    assert cells[cells.index("es 75 %, code 25 %") - 1 :][:4] == ["0", "es 75 %, code 25 %", "300", "es 100 %"]
    drawn = text.count("<figure")
    titles = re.findall(r'class="band"[^>]*><title>([^<]*)</title>', text)
    assert titles == ["from step 0: es 75 %, code 25 %", "from step 300: es 100 %"] * (len(titles) // 2)
    assert len(titles) == 2 * (drawn - text.count('class="bar"')), "under every curve"
    assert "mixture" not in text.partition("<h2>Environment")[2]


OTHER = [{"step": 0, "shares": {"es": 0.5, "code": 0.5}}, {"step": 350, "shares": {"es": 0.0, "code": 1.0}}]
ONE = [(0, "es 75 %, code 25 %"), (300, "es 100 %")]


@pytest.mark.parametrize(
    ("resumes", "phases"),
    [
        ([(100, MIXTURE)], ONE),
        ([(320, MIXTURE)], ONE),
        ([(300, MIXTURE)], ONE),
        ([(100, OTHER)], [ONE[0], (100, "es 50 %, code 50 %"), (350, "code 100 %")]),
        ([(320, OTHER)], [*ONE, (320, "es 50 %, code 50 %"), (350, "code 100 %")]),
        ([(200, OTHER), (100, MIXTURE)], ONE),
        ([(100, MIXTURE[:1])], []),
        ([(100, None)], [ONE[0], (100, "one dataset")]),
        ([(100, None), (200, OTHER[:1])], [ONE[0], (100, "one dataset"), (200, "es 50 %, code 50 %")]),
    ],
)
def test_the_phases_of_every_start(resumes, phases):
    """A run that was resumed with another mixture (``resume_allow=[data]``) shows what it was trained on before, too."""
    records = [started(mixture=MIXTURE), train(50)]
    for step, mixture in resumes:
        records += [started(mixture=mixture) | {"step": step, "resumed": True}, train(step + 10)]
    titles = re.findall(r'class="band"[^>]*><title>([^<]*)</title>', page([*records, train(400)]))
    assert sorted({*titles}) == sorted(f"from step {step}: {text}" for step, text in phases)


def test_one_dataset_has_no_parts_and_a_mixture_that_stays_no_bands():
    part = {"tokens": 1234, "share": 1.0, "wanted": 1.0, "epochs": 1.5}
    data = {"event": "data", "step": 400, "time": 1.0, "sources": {"a.txt": {"tokens": 9}}, "parts": {"es": part}}
    assert "by the weights" not in page([started(), train(400), data])
    assert 'class="band"' not in page([started(mixture=MIXTURE[:1]), train(100), train(400)])
