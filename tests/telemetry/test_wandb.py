"""The W&B sink: what its run file holds, offline; what a run does when W&B is down; one run in W&B for a run and its resumes."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.runtime.errors import UserError
from pretrain.runtime.locks import Lock
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.sinks import wandb_key
from pretrain.telemetry.sinks.jsonl import Jsonl, read_records
from pretrain.telemetry.sinks.wandb import RUN_ID, Wandb
from pretrain.telemetry.sinks.wandb_process import MessageHandler, Run
from tests.runs import assert_same_numbers, assert_same_run, run_code
from tests.wandb_tools import Server, of_kind, rows, run_file

KEY = "0123456789" * 4


@pytest.fixture(scope="module", autouse=True)
def own_folders(tmp_path_factory):
    """Neither the person's key nor their caches."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / name.lower()))
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(folder / "netrc"))
        yield


@pytest.fixture
def online(monkeypatch):
    """``online(url)``: a key, and a server of one's own."""

    def there(url: str) -> None:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)

    return there


def offline_folders(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*"))


def write(run: Path, start: RunStarted, records: list[dict], **keys) -> None:
    """One start of a run, through the sinks."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("lr: 0.001\nname: mine\n")
    sinks = [Wandb(mode="offline", **keys), Jsonl()]
    for sink in sinks:
        sink.open(run, start)
    for record in records:
        for sink in sinks:
            sink.write(record)
    for sink in sinks:
        sink.close()


def train(step, **more):
    return {"event": "train", "step": step, "time": 1000.0 + step, "loss": 1 / step, "mfu": None, **more}


def evaluation(step):
    more = {"domain": "books", "role": "new", "perplexity": 7.0 + step}
    return {"event": "evaluation", "step": step, "time": 1000.5 + step, **more}


STARTED = {"event": "run_started", "step": 0, "time": 1000.0, "parameters": 27_000}
METRIC = {"event": "metric", "step": 4, "time": 1004.7, "name": "accuracy", "domain": None, "value": 0.5}
SAMPLE = {
    "event": "sample",
    "step": 2,
    "time": 1002.0,
    "domain": "books",
    "role": "new",
    "prompt": "The",
    "text": " sea",
}
LAYERS = {"event": "layers", "step": 2, "time": 1002.0, "layers": {"head": {"grad_norm": 0.5}}}
DATA = {"event": "data", "step": 2, "time": 1002.0, "tokens_per_document": 9.5, "sources": {"a": {"share": 1.0}}}
ROLLBACK = {"event": "rollback", "step": 2, "time": 1003.0, "bad_step": 3, "reason": "spike"}
STOPPED = {"event": "run_finished", "step": 4, "time": 1009.0, "status": "stopped", "model": None, "tokens": 40}
FINISHED = STOPPED | {"status": "finished", "tokens_per_second": 12.5}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The folder of a job of a sweep that was stopped at step 4, and went on from step 3: (run, first id)."""
    sweep = tmp_path_factory.mktemp("nightly")
    (sweep / "sweep.json").write_text("{}")
    run, keys = sweep / "job", {"name": "mine", "tags": ["a"], "notes": "why", "log_model": True}
    (run / "model").mkdir(parents=True)
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    first = [STARTED, evaluation(0), train(1), train(2, skipped_steps=1), LAYERS, evaluation(2), SAMPLE, DATA, ROLLBACK]
    again = [train(3, skipped_steps=1), train(4, skipped_steps=1)]
    write(run, RunStarted(0, 9, resumed=False), [*first, *again, STOPPED], **keys)
    before = (run / RUN_ID).read_text()
    end = FINISHED | {"model": str(run / "model")}
    write(run, RunStarted(3, 9, resumed=True), [STARTED | {"step": 3}, again[1], evaluation(4), METRIC, end], **keys)
    assert (run / RUN_ID).read_text() == before
    return run


def test_a_resumed_run_has_each_row_once_and_one_folder_to_send(resumed):
    (folder,) = offline_folders(resumed)
    written = rows(run_file(folder))
    assert [(number, row["step"]) for number, row in written.items()] == [
        *((3, 0), (5, 1), (10, 2), (11, 2), (12, 2), (13, 2), (14, 2), (15, 3), (20, 4), (23, 4))
    ]
    assert written[15]["train/loss"] == 1 / 3
    assert written[15]["_timestamp"] == 1003.0
    assert "train/mfu" not in written[15]
    assert written[11]["layers/head/grad_norm"] == 0.5
    assert (written[12]["data/a/share"], written[12]["data/tokens_per_document"]) == (1.0, 9.5)
    assert written[23]["evaluation/books/perplexity"] == 11.0
    assert written[23]["metric/accuracy"] == 0.5
    (table,) = folder.glob("files/" + written[14]["samples/path"])
    assert json.loads(table.read_text())["data"] == [["books", "new", "The", " sea"]]
    assert len(list((resumed / "wandb/earlier").glob("offline-run-*"))) == 1


def test_what_a_run_is_and_how_it_ended(resumed):
    (earlier,) = (resumed / "wandb/earlier").glob("offline-run-*")
    (now,) = offline_folders(resumed)
    for folder, status, code in ((earlier, "stopped", 75), (now, "finished", 0)):
        records = run_file(folder)
        run = of_kind(records, "run")[0]
        assert (run.run_id, run.project, run.display_name) == ((resumed / RUN_ID).read_text(), "pretrain", "mine")
        assert (run.run_group, list(run.tags), run.notes) == (resumed.parent.name, ["a"], "why")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["lr"] == 0.001
        summary = {item.key: item.value_json for s in of_kind(records, "summary") for item in s.update}
        assert json.loads(summary["status"]) == status
        assert of_kind(records, "exit")[0].exit_code == code
    titles = [alert.title for alert in of_kind(run_file(earlier), "alert")]
    assert titles == ["Steps skipped", "Rolled back to a checkpoint", "Run stopped"]
    assert of_kind(run_file(now), "alert") == [], "what was told is not told again"
    (facts,) = [i for c in of_kind(run_file(now), "config") for i in c.update if i.key == "facts" or i.nested_key]
    assert json.loads(facts.value_json) == {"parameters": 27_000}


def test_the_final_model_is_an_artifact(resumed):
    (folder,) = offline_folders(resumed)
    (artifact,) = [a for a in of_kind(run_file(folder), "artifact") if a.type == "model"]
    assert [(e.path, e.local_path) for e in artifact.manifest.contents] == [
        ("model.safetensors", str(resumed / "model" / "model.safetensors"))
    ]


def test_charts_have_the_step_as_their_axis(resumed):
    (folder,) = offline_folders(resumed)
    metrics = {m.glob_name or m.name: m.step_metric for m in of_kind(run_file(folder), "metric")}
    assert metrics["*"] == "step"


def test_a_run_that_begins_anew_is_another_one(tmp_path):
    sink = Wandb(mode="disabled")
    sink.open(tmp_path, RunStarted(0, 9, resumed=False))
    assert not (tmp_path / RUN_ID).exists()
    from pretrain.telemetry.sinks.wandb import run_id

    first = run_id(tmp_path, fresh=True)
    assert run_id(tmp_path, fresh=False) == first
    assert run_id(tmp_path, fresh=True) != first


# -- the key ------------------------------------------------------------------------------------------------------------


def test_where_a_key_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not wandb_key.has_key()
    with pytest.raises(UserError, match=r"there is no key for https://api\.forge\.coreweave\.com: run `wandb login`"):
        Wandb(mode="online").check()
    Wandb().check()  # offline then
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.here:8443\n")
    assert wandb_key.server() == "https://wandb.here:8443"
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x1234567\n")
    assert not wandb_key.has_key(), "it is of another server"
    (tmp_path / "netrc").write_text("machine wandb.here:8443 login user password x1234567\n")
    assert wandb_key.has_key()
    Wandb(mode="online").check()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_key.has_key()


@pytest.mark.parametrize("host", ["api.forge.coreweave.com", "api.wandb.ai"])
def test_a_key_that_wandb_finds_is_found(host, tmp_path, monkeypatch):
    """The cloud has had another name, under which keys of earlier logins lie."""
    from wandb.sdk.lib.wbauth.wbnetrc import read_netrc_auth

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine {host} login user password {KEY}\n")
    assert wandb_key.has_key()
    assert read_netrc_auth(host=wandb_key.CLOUD) == KEY
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.here")
    assert not wandb_key.has_key()


def test_the_current_folder_names_no_server(tmp_path, monkeypatch):
    """``wandb/settings`` of a stranger's folder would have the key sent to a server of theirs, or records to their account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "mine"))
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nbase_url = https://theirs\napi_key = theirs\nmode = offline\n")
    assert wandb_key.server() == wandb_key.CLOUD
    assert not wandb_key.has_key()
    assert Wandb()._configured_mode() == "offline"
    code = (
        "from pretrain.telemetry.sinks.wandb_process import read_settings; import wandb; read_settings()\n"
        "print(wandb.setup().settings.base_url, wandb.setup().settings.api_key)"
    )
    told = run_code(code).stdout
    server, key = told.split()
    assert server == wandb_key.CLOUD
    assert key == "None"


def test_wandb_offline_said_to_wandb_itself_holds(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert Wandb()._configured_mode() == "offline"
    assert Wandb(mode="online")._configured_mode() == "online", "the key of the config says more"


# -- outages ------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


OUTAGES = {
    "broken": lambda: Server("broken").url,
    "refused": lambda: f"http://127.0.0.1:{free_port()}",
    "slow": lambda: Server("slow").url,
}


@pytest.mark.parametrize("outage", [pytest.param(o, marks=[pytest.mark.slow] * (o != "broken")) for o in OUTAGES])
def test_a_run_whose_wandb_is_down(outage, online, uninterrupted, base_arguments, command, tmp_path):
    """It ends with 0 and the very weights and records of the run without W&B; its W&B run is there to be sent later."""
    online(OUTAGES[outage]())
    run = tmp_path / "run"
    wishes = ["sink=[console,jsonl,wandb]", "sink.wandb.mode=online", "sink.wandb.timeout=2"]
    code, _, err = command([*base_arguments, *wishes, f"output_dir={run}"])
    assert code == 0, err
    assert err.count("W&B can't be reached, so this run is recorded offline") == 1
    assert_same_run(run, uninterrupted)
    (folder,) = offline_folders(run)
    records = run_file(folder)
    steps = {row["step"] for row in rows(records).values() if "train/loss" in row}
    assert steps == set(range(1, 21))
    assert of_kind(records, "exit")[0].exit_code == 0
    assert KEY not in "".join(f.read_text(errors="replace") for f in run.rglob("*") if f.is_file())


NO_TABLES = "evaluation.samples=0"  # online they are artifacts, which the server of these tests does not know


@pytest.mark.slow
def test_a_run_whose_wandb_goes_down_on_the_way(online, base_arguments, command, tmp_path):
    server = Server("dying")
    online(server.url)
    run = tmp_path / "run"
    wishes = ["sink=[console,jsonl,wandb]", "sink.wandb.timeout=3", NO_TABLES]
    code, _, err = command([*base_arguments, *wishes, f"output_dir={run}"])
    assert code == 0, err
    assert server.mood == "broken"
    assert "W&B did not receive everything in time; to send it: wandb sync --include-online" in err
    code, _, said = command([*base_arguments, NO_TABLES, f"output_dir={tmp_path / 'without'}"])
    assert code == 0, said
    assert_same_run(run, tmp_path / "without")
    server.mood = "fine"
    (folder,) = (run / "wandb").glob("run-*")
    wandb_sync("--include-online", folder)
    assert train_steps(server.lines()) == list(range(1, 21))


# -- stopping and going on ----------------------------------------------------------------------------------------------

STOP = ["allow_targets=[tests.stopper.Stopper]", "+sink.stop={_target_: tests.stopper.Stopper, event: train, at: 8}"]


def train_steps(history) -> list[int]:
    return [row["step"] for row in history if "train/loss" in row]


@pytest.mark.slow
def test_stopped_and_continued_offline(uninterrupted, base_arguments, spawn, tmp_path):
    """By SIGTERM at a step whose evaluation is then owed."""
    run = tmp_path / "run"
    arguments = [*base_arguments, "sink=[jsonl,wandb]", *STOP, f"output_dir={run}"]
    for expected in (75, 0):
        process = spawn(arguments)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == expected, out
        assert "so this run is recorded offline" in out
    assert_same_numbers(run, uninterrupted)
    (folder,) = offline_folders(run)
    history = rows(run_file(folder)).values()
    assert train_steps(history) == list(range(1, 21))
    evaluations = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation"]
    asked = [(r["step"], r["perplexity"]) for r in evaluations if r["domain"] == "other"]
    key = "evaluation/other/perplexity"
    assert [(row["step"], row[key]) for row in history if key in row] == asked
    config = yaml.safe_load((run / "config.yaml").read_text())
    sent = of_kind(run_file(folder), "run")[0].config.update
    assert {i.key: json.loads(i.value_json) for i in sent if i.key == "lr"} == {"lr": config["lr"]}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_continued_online(how, online, base_arguments, spawn, tmp_path):
    """The server has every row once, also of steps that were trained twice."""
    server = Server()
    online(server.url)
    run = tmp_path / "run"
    stop = STOP if how == "stopped" else [STOP[0], STOP[1].replace("at: 8", "at: 17, number: 9")]  # one is saved
    arguments = [*base_arguments, "sink=[jsonl,wandb]", NO_TABLES, *stop, f"output_dir={run}"]
    for expected in (75 if how == "stopped" else -9, 0):
        process = spawn(arguments)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == expected, out
    history = server.lines()
    assert train_steps(history) == list(range(1, 21))
    numbers = [row["_step"] for row in history]
    assert numbers == sorted(set(numbers))
    assert len({upsert["name"] for upsert in server.upserts if upsert.get("name")}) == 1


@pytest.mark.slow
def test_wandb_sync_sends_what_was_recorded_offline(online, tmp_path):
    """Also when an earlier start's folder was sent before: the newest one is the whole run."""
    server = Server()
    online(server.url)
    write(tmp_path, RunStarted(0, 9, resumed=False), [STARTED, evaluation(0), train(1), train(2), train(3), STOPPED])
    wandb_sync(*offline_folders(tmp_path))
    assert train_steps(server.lines()) == [1, 2, 3]
    write(tmp_path, RunStarted(2, 9, resumed=True), [train(3), train(4), evaluation(4), FINISHED])
    wandb_sync(*offline_folders(tmp_path))
    assert train_steps(server.lines()) == [1, 2, 3, 4]
    assert [row["step"] for row in server.lines() if "evaluation/books/perplexity" in row] == [0, 4]


def wandb_sync(*arguments: str | Path) -> None:
    program = [sys.executable, "-m", "wandb", "sync", *map(str, arguments)]
    run = Path(arguments[-1]).parents[1]  # the program leaves a log where it is started
    done = subprocess.run(program, cwd=run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_that_w_and_b_cannot_end_is_over_all_the_same(tmp_path, monkeypatch, capsys):
    """Its lock is free, no second end is tried, and the log has no secret."""
    monkeypatch.setenv("SOME_API_KEY", "a-secret-of-mine")

    class Broken:
        def finish(self, **_):
            raise RuntimeError("a-secret-of-mine was refused")

    run = Run.__new__(Run)
    run._rows, run._exit_code, run._run, run._lock = {}, 0, Broken(), Lock(tmp_path / "lock")
    run._lock.acquire()
    orders = MessageHandler(sys.stdout)
    orders._run = run
    orders.handle({"end": None})
    orders.close_failed()
    assert not run._lock.descriptors
    out, err = capsys.readouterr()
    assert "RuntimeError: *** was refused" in out
    assert "Traceback" in err
    assert "a-secret-of-mine" not in out + err
