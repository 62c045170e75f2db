"""The console sink, given records: on a real terminal, on a narrow one, without colours, where there is none."""

import os
import re
import sys

import pytest

from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import change_of, scored_before
from pretrain.telemetry.sinks.jsonl import Jsonl
from pretrain.telemetry.sinks.terminal import Terminal
from pretrain.telemetry.sinks.terminal_tables import BLOCKS, one_line, sparkline
from tests.telemetry.fed import Fed

ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|4[0-7]|9[0-7]|38;[\d;]+|48;[\d;]+)(?:;\d+)*m")
CURSOR = re.compile(r"\x1b\[\d+A")


def train(step, loss, **more):
    old = {"event": "train", "step": step, "loss": loss, "lr": 1e-3, "tokens_per_second": 5000.0, "memory_gib": 0.5}
    return old | {"grad_norm": 1.5, "step_seconds": 0.5, "data_seconds": 0.0, "mfu": None} | more


def evaluation(step, domain, role, loss, before):
    numbers = {"perplexity": 2.718**loss, "bits_per_byte": None, "tokens": 100, "delta_loss": loss - before}
    return {"event": "evaluation", "step": step, "domain": domain, "role": role, "loss": loss} | numbers


def sample(step, text, prompt="def f(x):\n    return"):
    return {"event": "sample", "step": step, "domain": "python", "role": "new", "prompt": prompt, "text": text}


STARTED = {"event": "run_started", "step": 0, "total_steps": 40, "resumed": False, "model": "tiny", "device": "cpu"}
FINISHED = {"event": "run_finished", "step": 40, "status": "finished", "tokens": 4000, "tokens_per_second": 5000.0}
FINISHED |= {"model": None}
RUN = [
    STARTED,
    evaluation(0, "python", "new", 4.0, 4.0),
    evaluation(0, "english", "base", 3.0, 3.0),
    sample(0, " x.\x1b[31mred\x07\n\n    y"),
    *(train(step, 4.0 - step / 40) for step in range(1, 40)),
    train(40, None),
    evaluation(40, "python", "new", 3.5, 4.0),
    evaluation(40, "english", "base", 3.2, 3.0),
    sample(40, " x + 1" * 40),
    FINISHED,
]
SPLIT = {"compute_seconds": 0.3, "optimizer_seconds": 0.1, "evaluation_seconds": 5.0, "checkpoint_seconds": 0.0}
SPLIT |= {"mfu": 0.412, "memory_reserved_gib": 1.0, "host_memory_gib": 2.0, "eta_seconds": 3723.0}


def play(records, tmp_path, level=3):
    sink = Fed(Terminal(level))
    sink.open(tmp_path, RunStarted(records[0]["step"], 40, resumed=records[0]["resumed"]))
    for record in records:
        sink.write(record)
    sink.close()


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """``terminal(records, columns)``: what a real terminal is sent."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def run(records=RUN, columns=100, level=3):
        monkeypatch.setenv("COLUMNS", str(columns))
        reader, writer = os.openpty()
        read = b""
        os.set_blocking(reader, False)
        with os.fdopen(writer, "w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stdout", Drained(stream, reader))
            play(records, tmp_path, level)
            read = sys.stdout.read
        monkeypatch.undo()
        os.close(reader)
        return read.decode()

    return run


class Drained:
    """A terminal that is read as it is written, so that its buffer never fills."""

    def __init__(self, stream, reader):
        self.stream, self.reader, self.read = stream, reader, b""
        self.encoding = "utf-8"

    def write(self, text):
        for start in range(0, len(text), 500):
            self.stream.write(text[start : start + 500])
            self.flush()
        return len(text)

    def flush(self):
        self.stream.flush()
        try:
            while piece := os.read(self.reader, 1 << 16):
                self.read += piece
        except BlockingIOError:
            pass

    def isatty(self):
        return self.stream.isatty()

    def fileno(self):
        return self.stream.fileno()


def test_a_terminal_has_a_bar_and_a_curve(terminal):
    shown = terminal()
    assert CURSOR.search(shown), "the bar is drawn over"
    assert COLOUR.search(shown)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert "20/40 ━" in plain
    assert re.search(f"[{BLOCKS}]{{30}}", plain), "the curve of the losses"
    assert "×" in plain, "where the loss was no number"
    assert "step 20/40" not in plain, "no line a step beside the bar"
    assert "↓ 0.5000 nats better than at step 0" in plain
    assert "↑ 0.2000 nats worse than at step 0" in plain


def test_a_run_that_goes_on_begins_where_it_was(terminal):
    shown = terminal([STARTED | {"step": 20, "resumed": True}, train(21, 3.0)])
    counts = re.findall(r"(\d+)/40 ━", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown))
    assert list(dict.fromkeys(counts)) == ["20", "21"]


def test_no_color_is_respected(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    shown = terminal()
    assert CURSOR.search(shown)
    assert not COLOUR.search(shown)


def test_a_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown = terminal()
    assert ESCAPE not in shown
    assert "step 20/40  loss 3.5000" in shown


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_it_fits_the_terminal(columns, terminal):
    """Whatever is redrawn must not wrap: a line that does is not drawn over but left behind."""
    records = [r | SPLIT if r["event"] == "train" else r for r in RUN]
    frames = re.split(r"\x1b\[\d+A\x1b\[2K", terminal(records, columns))
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frame).split("\r\n")[:2] for frame in frames[1:]]
    drawn = [line.strip("\r") for frame in lines for line in frame if "━" in line or line.startswith("loss ")]
    assert len(drawn) > 40
    assert max(map(len, drawn)) <= columns
    assert any(line.startswith("loss 3.5") and any(b in line for b in BLOCKS) for line in drawn)
    assert any("1 h 02 min left" in line for line in drawn)
    assert any("MFU 41.2%" in line for line in drawn) == (columns == 100)


@pytest.mark.parametrize("forced", [False, True])
def test_no_terminal_has_plain_lines(forced, tmp_path, capsys, monkeypatch):
    """With FORCE_COLOR too nothing is drawn over: a log keeps every line."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    play(RUN, tmp_path)
    out = capsys.readouterr().out
    assert not CURSOR.search(out)
    assert forced or ESCAPE not in out
    plain = re.sub(r"\x1b\[[\d;?]*m", "", out)
    assert len(re.findall(r"^step +\d+/40  loss", plain, re.MULTILINE)) == 40
    assert "finished at step 40/40: 4,000 tokens" in plain


@pytest.mark.parametrize("columns", [40, 71, 72, 100])
def test_the_table_fits(columns, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    play(RUN, tmp_path)
    table = capsys.readouterr().out.split("─ \n")[1].split("python (new)  def")[0]
    assert max(map(len, table.splitlines())) <= columns
    assert ("↓ 0.5000 better" in table) == (columns >= 72)
    assert "↓ 0.5000" in table


def test_every_prompt_of_the_user_s_is_shown(tmp_path, capsys):
    own = [sample(step, f" text {step}", p) | {"role": "user"} for step in (0, 40) for p in ("one", "two")]
    play([*RUN[:-1], *own, FINISHED], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    for prompt in ("one", "two"):
        at = lines.index(f"python (user)  {prompt}")
        assert lines[at + 1 : at + 3] == ["  before text 0", "  after  text 40"]


def test_samples_are_one_line_and_can_do_nothing_to_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    play(RUN, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    before = next(line for line in lines if line.startswith("  before "))
    after = next(line for line in lines if line.startswith("  after "))
    assert before == "  before x.·[31mred· ⏎ y"
    assert after.startswith("  after  x + 1 x + 1")
    assert after.endswith("…")
    assert len(after) == 80
    assert "python (new)  def f(x): ⏎ return" in lines


@pytest.mark.parametrize(
    ("level", "has", "has_not"),
    [
        (1, ["trains 40 steps", "finished at"], ["than at step 0", "step 20/40"]),
        (2, ["than at step 0"], ["step 20/40"]),
        (3, ["step 20/40"], ["grad norm"]),
        (4, ["grad norm 1.50  0.50 GiB"], []),
    ],
)
def test_levels(level, has, has_not, tmp_path, capsys):
    play(RUN, tmp_path, level)
    out = capsys.readouterr().out
    assert all(words in out for words in has)
    assert not any(words in out for words in has_not)


def test_the_summary_says_where_the_time_went(tmp_path, capsys):
    """Of 20 s in steps 12 are forward+backward, 4 the optimizer, 4 are left; beside them 40 × 0.5 s of evaluation."""
    records = [r | SPLIT | {"evaluation_seconds": 0.5} if r["event"] == "train" else r for r in RUN]
    records[-1] = FINISHED | {"mfu": 0.412, "goodput": 0.5}
    play(records, tmp_path)
    out = capsys.readouterr().out
    assert "5,000 tokens/s · MFU 41.2% · goodput 50%" in out
    assert "40 s  ■ forward+backward 30%  ■ optimizer 10%  ■ other 10%  ■ evaluation 50%" in out
    assert "0.50 GiB peak · 2.00 GiB on the host" in out


def test_records_of_an_older_run(tmp_path, capsys):
    """Without samples, without the split of a step."""
    play([r for r in RUN if r["event"] != "sample"], tmp_path)
    out = capsys.readouterr().out
    assert "training 100%" in out
    assert "before " not in out.split("finished at")[1]


def test_a_resumed_run_remembers_what_was_before(tmp_path, capsys):
    jsonl = Jsonl()
    jsonl.open(tmp_path, RunStarted(0, 40, resumed=False))
    for record in RUN[:24]:
        jsonl.write(record)
    jsonl.close()
    resumed = [STARTED | {"step": 20, "resumed": True}, train(21, 3.0), *RUN[-5:]]
    play(resumed, tmp_path)
    out = capsys.readouterr().out
    assert "  before x.·[31mred·" in out
    assert "↓ 0.5000 better" in out


def test_a_curve():
    assert sparkline([1.0, 2.0, 3.0, 4.0, None, 8.0], 5) == "▁▂▃×█"
    assert sparkline([1.0] * 3, 40) == "▁▁▁"
    assert sparkline([None, None], 40) == "××"
    assert sparkline([], 40) == sparkline([1.0], 0) == ""


def test_a_run_that_is_stopped_before_its_second_evaluation(tmp_path, capsys, monkeypatch):
    """It said `after 54.58, change 0.0000`, of what nobody had measured."""
    monkeypatch.setenv("COLUMNS", "100")
    stopped = FINISHED | {"step": 5, "status": "stopped"}
    play([*RUN[:4], train(1, 3.9), train(5, 3.8), stopped], tmp_path)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("  python (new)")]
    assert "  before x." in out, "the sample of step 0 is not how the model continues now"
    assert rows == [["python", "(new)", "54.58", "—", "not", "scored", "since", "step", "0"]]


def test_a_score_that_is_not_of_the_last_step_says_of_which(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    scored = [evaluation(0, "python", "new", 4.0, 4.0), evaluation(8, "python", "new", 3.5, 4.0)]
    play([STARTED, *scored, train(12, 3.4), FINISHED | {"step": 12, "status": "stopped"}], tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"python \(new\) +54.58 +33.10 \(step 8\) +↓ 0.5000 better", out)


def test_a_change_that_is_not_known_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    now = evaluation(40, "python", "new", 3.5, 4.0)
    reason = {"delta_loss": None, "delta_reason": "step 0 was scored with other text", "digest": "b"}
    play([STARTED, evaluation(0, "python", "new", 4.0, 4.0) | {"digest": "a"}, now | reason, FINISHED], tmp_path)
    out = capsys.readouterr().out
    assert "perplexity  33.10  change since step 0 unknown: step 0 was scored with other text\n" in out
    assert re.search(r"python \(new\) +— +33.10 +—", out)
    assert "python: change since step 0 unknown: step 0 was scored with other text\n" in out
    assert "54.58" not in out.split("step 40")[1], "the perplexity of other text"


def test_there_is_no_time_left_before_there_is_a_pace(terminal):
    """The first step compiles: by its seconds a run of hours would take days."""
    shown = terminal([STARTED, train(1, 4.0, step_seconds=60.0, eta_seconds=None)])
    assert "1/40 ━" in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert not re.search(r"\d s left|min left|h left", shown)


def test_a_speed_that_is_not_known_is_not_zero(tmp_path, capsys):
    play([STARTED, train(1, 4.0, tokens_per_second=None)], tmp_path)
    assert "step  1/40  loss 4.0000  lr 1.00e-03\n" in capsys.readouterr().out


def test_what_was_before_is_worked_out_of_a_later_record():
    """A run of 2.0 nats that got 0.5 worse began with 1.5, whose perplexity is 4.48; not with 2.5."""
    record = {"event": "evaluation", "step": 8, "domain": "d", "loss": 2.0, "perplexity": 7.39, "delta_loss": 0.5}
    before = scored_before(None, record)
    assert (before["step"], before["loss"]) == (0, 1.5)
    assert before["perplexity"] == pytest.approx(4.4817, abs=1e-4)
    zero = record | {"step": 0, "loss": 1.5, "delta_loss": 0.0}
    assert scored_before(None, zero) is zero
    assert scored_before(zero, record) is zero
    assert scored_before(zero, record | {"digest": "b"})["loss"] == 1.5
    for nothing in ({"loss": None}, {"delta_loss": None}):
        assert scored_before(None, record | nothing)["loss"] is None
    assert scored_before(zero, record | {"loss": None}) is zero, "a loss that is no number takes nothing back"
    assert [change_of(r) for r in (zero, record, record | {"loss": None}, record | {"delta_loss": None})] == [
        *(None, 0.5, None, None)
    ]


def test_a_rollback_takes_the_scores_back(tmp_path, capsys):
    """That of step 20 is of the branch that was left."""
    jsonl, sink = Jsonl(), Fed(Terminal())
    jsonl.open(tmp_path, RunStarted(0, 40, resumed=False))
    sink.open(tmp_path, RunStarted(0, 40, resumed=False))
    scores = [evaluation(s, "python", "new", loss, 4.0) for s, loss in ((0, 4.0), (10, 3.0), (20, 9.0))]
    for record in [STARTED, scores[0], train(10, 3.5), scores[1], train(20, 9.0), scores[2]]:
        jsonl.write(record)
        sink.write(record)
    sink.close()
    sink.open(tmp_path, RunStarted(10, 40, resumed=True))
    sink.write(FINISHED | {"step": 10, "status": "stopped"})
    assert re.search(r"python \(new\) .* ↓ 1.0000 better", capsys.readouterr().out.split("change in loss")[1])


def metric(step, value, **more):
    return {"event": "metric", "step": step, "name": "accuracy", "domain": None, "value": value, "unit": None} | more


def test_the_table_of_metrics_has_one_column_where_each_was_measured_once(tmp_path, capsys):
    """An evaluation of a model measures once; a run measures before and after, and a metric that came late has no first."""
    once = [STARTED, metric(40, 0.25, stderr=0.0125, better="higher"), metric(40, None, name="gain"), FINISHED]
    play(once, tmp_path, level=1)
    (header, _, *rows) = table_of(capsys.readouterr().out, "metric")
    assert header == ["metric", "value", "better"]
    assert rows == [["accuracy", "0.25 ± 0.0125", "higher"], ["gain", "nan"]]
    play([STARTED, metric(0, 0.5), *once[1:]], tmp_path, level=1)
    (header, _, *rows) = table_of(capsys.readouterr().out, "metric")
    assert header == ["metric", "first", "last", "better"]
    assert rows == [["accuracy", "0.5", "0.25 ± 0.0125", "higher"], ["gain", "—", "nan"]]


def table_of(out, first):
    """The rows of a table as lists of cells, from the header with ``first`` on."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    start = next(i for i, cells in enumerate(lines) if cells[0] == first)
    rest = lines[start:]
    return rest[: next((i for i, cells in enumerate(rest) if cells == [""]), len(rest))]


def test_one_line():
    assert one_line("a\n\n  b\tc\x9b31m") == "a ⏎ b·c·31m"
