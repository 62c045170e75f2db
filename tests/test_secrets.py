"""No secret reaches a file of a run or the terminal: planted ones are searched for in every byte (docs/security.md)."""

import base64
import json
import urllib.parse
from pathlib import Path

import pytest

from pretrain.runtime.redact import find_secret, redact, secrets
from tests.cli.test_cli import assert_mistake
from tests.launch.test_launch import PAIR
from tests.runs import injected, run_code

HF = "hf_" + "PlantedPlantedPlanted"
PLANTED = {
    "HF_TOKEN": HF,
    "HUGGING_FACE_HUB_TOKEN": "hub-planted-4711",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "planted!",
    "MY_DB_PASSWORD": "planted-password",
    "CLOUD_SECRET_KEY": "planted/secret+key=",
    "MY_PASSPHRASE": "pl'anted\"pass\\phrase/ü",
}
IN_FILES = ("planted-in-token-file", "planted-in-netrc")


@pytest.fixture
def planted(tmp_path, monkeypatch) -> list[str]:
    """The secrets that this process and its children can know."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "token").write_text(IN_FILES[0] + "\n")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {IN_FILES[1]}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return [*PLANTED.values(), *IN_FILES]


QUOTED = {
    "as it is": str,
    "repr": repr,
    "in a list": lambda s: repr([s]),
    "bytes": lambda s: repr(s.encode()),
    "JSON": json.dumps,
    "JSON with its letters": lambda s: json.dumps(s, ensure_ascii=False),
    "URL": lambda s: urllib.parse.quote(s, safe=""),
    "URL path": urllib.parse.quote,
    "form": urllib.parse.quote_plus,
    "base64": lambda s: base64.b64encode(s.encode()).decode(),
}


QUOTING = """
import os, torch
step = torch.optim.AdamW.step
def broken(*given, **named):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("broken: " + repr(os.environ["PLANTED"].split()))
    return step(*given, **named)
torch.optim.AdamW.step = broken
"""


def assert_nowhere(secrets: list[str], folder: Path, *texts: str) -> None:
    """None of them, in none of the forms in which a text may quote it."""
    forms = {quoting(secret).strip("\"'b[]").rstrip("=") for quoting in QUOTED.values() for secret in secrets}
    files = [file for file in folder.rglob("*") if file.is_file()]
    leaks = [(file, form) for file in files for form in forms if form.encode() in file.read_bytes()]
    assert leaks == []
    assert [(form, text) for text in texts for form in forms if form in text] == []


def test_a_run_leaves_none(planted, spawn, base_arguments, tmp_path):
    """Nor one that stood on the command line, as the name of a variable, and lost to a later word."""
    run = tmp_path / "run"
    given = [*base_arguments, f"output_dir={run}", "sink=[console,jsonl,report]"]
    process = spawn([*given, "name=${oc.env:WANDB_API_KEY}", "name=books"])
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    written = {file.relative_to(run).parts[0] for file in run.rglob("*") if file.is_file()}
    assert {
        "config.yaml",
        ".hydra",
        "run.json",
        "metrics.jsonl",
        "logs",
        "report.html",
        "checkpoints",
        "model",
    } <= written
    assert_nowhere(planted, run, text)


@pytest.mark.slow
def test_no_sink_writes_any(planted, spawn, base_arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    process = spawn([*base_arguments, f"output_dir={run}", "sink=[csv,tensorboard,wandb]"])
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    names = {file.name.partition(".")[0] for file in run.rglob("*") if file.is_file()}
    assert "events" in names, "TensorBoard's"
    assert list(run.rglob("*.csv"))
    assert list(run.rglob("*.wandb"))
    assert_nowhere(planted, run, text)


@pytest.mark.slow
def test_a_rank_that_fails_says_none(planted, spawn, base_arguments, tmp_path, monkeypatch):
    """Its exception quotes every secret: to the parent, who tells it, and in its log."""
    monkeypatch.setenv("PLANTED", " ".join(planted))
    run = tmp_path / "run"
    process = spawn([*base_arguments, *PAIR, f"output_dir={run}"], env=injected(tmp_path, QUOTING))
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 1, text
    assert "RuntimeError: broken: ['***', " in text
    assert "RuntimeError: broken: ['***', " in (run / "logs/rank-1.log").read_text()
    assert_nowhere(planted, run, text)


def test_a_failure_says_none(planted, base_arguments, tmp_path):
    """A library's exception that quotes every secret: in the traceback on the terminal and in the log."""
    run = tmp_path / "run"
    code = (
        "import os, torch\n"
        "def broken(*a, **k): raise RuntimeError('broken: ' + quoted(os.environ['PLANTED'].split()))\n"
        "from base64 import b64encode\nfrom json import dumps\nfrom urllib.parse import quote\n"
        "def quoted(texts): return ' '.join([repr(texts), dumps(texts), *map(quote, texts),\n"
        "    *(b64encode(text.encode()).decode() for text in texts)])\n"
        "torch.optim.AdamW.step = broken\n"
        "from pretrain.cli.main import program\nprogram()"
    )
    done = run_code(code, *base_arguments, f"output_dir={run}", PLANTED=" ".join(planted))
    assert done.returncode == 1
    assert "RuntimeError: broken: ['***', " in done.stderr
    assert "RuntimeError: broken: ['***', " in (run / "logs" / "rank-0.log").read_text()
    assert_nowhere(planted, run, done.stdout, done.stderr)


LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hJ6kM9nP2rS5uX8"
SHAPED = {  # text → what is left of it
    "redis://:pw@host/0": "redis://***@host/0",
    "postgresql://me:pa/ss:w@host:5432/x": "postgresql://***@host:5432/x",
    f"https://{LETTERS[:20]}@host/repo.git": "https://***@host/repo.git",
    "https://oauth2:x@host/a": "https://***@host/a",
    f"WANDB_API_KEY={'0123456789abcdef0123' * 2}": "WANDB_API_KEY=***",
    f"the API key is {'0123456789abcdef0123' * 2}.": "the API key is ***.",
    f'{{"api_key": "{"0123456789abcdef0123" * 2}"}}': '{"api_key": "***"}',
    "AKIAIOSFODNN7EXAMPLE": "***",
    f"ghp_{LETTERS[:36]}": "***",
    f"github_pat_{LETTERS[:30]}": "***",
    f"glpat-{LETTERS[:20]}": "***",
    "xoxb-1234567890-abcdefghij": "***",
    f"sk-proj-{LETTERS}": "***",
    f"sk-ant-api03-{LETTERS}": "***",
    f"key AIza{LETTERS[:35]}": "key ***",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{LETTERS}": "***",
    f"Authorization: Bearer {LETTERS}": "Authorization: Bearer ***",
    f"{{'authorization': 'Basic {LETTERS}'}}": "{'authorization': 'Basic ***'}",
    f"https://host/x?token={LETTERS}&page=2": "https://host/x?token=***&page=2",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE+/=\nabc\n-----END RSA PRIVATE KEY-----, said he": "***, said he",
    "'-----BEGIN PRIVATE KEY-----\\nMIIE\\n-----END PRIVATE KEY-----\\n'": "'***\\n'",
}


@pytest.mark.parametrize("text", SHAPED)
def test_what_looks_like_a_secret_goes(text):
    assert redact(f"a {text} b") == f"a {SHAPED[text]} b"
    assert find_secret(text, {}) is not None


INNOCENT = [
    "81ca0264f621816b6c89d9dc0a283c70d9d9081c",  # a commit
    "revision=81ca0264f621816b6c89d9dc0a283c70d9d9081c",
    "model.revision: 81ca0264f621816b6c89d9dc0a283c70d9d9081c",
    "sha256: " + "0123456789abcdef" * 4,
    "d41d8cd98f00b204e9800998ecf8427e  data.parquet",
    "the token cache's key d41d8cd98f00b204e9800998ecf8427e",
    "https://huggingface.co/datasets/a/b/resolve/main/x.parquet?download=true",
    "http://localhost:8080/a/@me/x",
    "https://user@host/repo.git",
    "git@github.com:a/b.git",
    "ssh://git@github.com/a/b.git",
    "hf://datasets/a/b@main/x",
    "s3://bucket/a:b/c@2",
    "/data/sk-fold-cross-validation-results/x",
    "a bearer of long-lasting-certificates",
    "tokens per second: 12345678",
    "basic tokenizer_configuration_of_mine",
    "Meta-Llama-3-8B-Instruct-GGUF-Q4_K_M_very_long_name_0123456789",
]


@pytest.mark.parametrize("text", INNOCENT)
def test_no_false_alarm(text):
    assert redact(text) == text
    assert find_secret(text, {}) is None


AWKWARD = ['it\'s "quoted"', "back\\slash\\t", "слово-пароль", "a b&c=d/e+f%g", "line one\nline two", "=abcDEF/123+"]


@pytest.mark.parametrize("quoting", QUOTED)
@pytest.mark.parametrize("secret", AWKWARD)
def test_a_quoted_secret_goes_too(secret, quoting, monkeypatch):
    monkeypatch.setenv("MY_PASSPHRASE", secret)
    text = QUOTED[quoting](secret)
    said = redact(f"sent {text} off")
    assert text.strip("\"'=b[]") not in said
    assert said.startswith("sent ")
    assert said.endswith(" off")
    assert "***" in said
    assert find_secret(text, secrets()) == "the value of $MY_PASSPHRASE"


NAMED = [
    "MY_PASSPHRASE",
    "AWS_SECRET_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "PGPASSWORD",
    "SMTP_PASS",
    "GITLAB_PAT",
]


@pytest.mark.parametrize("name", NAMED)
def test_variables_that_hold_secrets(name, monkeypatch):
    monkeypatch.setenv(name, "a-planted-value")
    assert redact("x a-planted-value y") == "x *** y"


CONFIGS = {
    "an interpolated variable": ("name=${oc.env:WANDB_API_KEY}", "name: holds the value of $WANDB_API_KEY"),
    "inside a text": ("dataset.name=x${oc.env:MY_DB_PASSWORD}x", "the value of $MY_DB_PASSWORD"),
    "a key": ("+model.overrides={planted-password: 1}", "the value of $MY_DB_PASSWORD"),
    "an item": ("generation.prompts=[a,planted-in-token-file]", "the token in "),
    "from netrc": (f"model.tokenizer_name={IN_FILES[1]}", "the password of api.wandb.ai"),
    "looks like one": ("dataset.name=hf_NobodysNobodysNobodys", "holds a Hugging Face token"),
    "a URL": ("dataset.nameOrPath=https://me:letmein@host/data", "holds a password in a URL"),
}


@pytest.mark.parametrize("mode", [[], ["-m", "seed=0,1"]])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_may_hold_none(name, mode, planted, command, base_arguments, tmp_path, monkeypatch):
    """Refused before a folder is made; the message names the place, not the secret. A sweep stops at it too."""
    monkeypatch.chdir(tmp_path)
    override, says = CONFIGS[name]
    outcome = command([*mode, *base_arguments, f"output_dir={tmp_path / 'run'}", override])
    secrets = [*planted, "hf_NobodysNobodysNobodys", "letmein"]
    if not mode or "${" not in override:
        assert_mistake(outcome, says)
    assert outcome[0] == 2
    assert not (tmp_path / "run").exists()
    multirun = tmp_path / "multirun"
    assert_nowhere(secrets, multirun, *outcome[1:])


def test_a_file_may_hold_none(planted, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "theirs.yaml").write_text(f"# @package _global_\nname: {HF}\n")
    for mode in ([], ["-m"]):
        outcome = command(["--config-dir", str(tmp_path), "experiment=theirs", *mode])
        assert_mistake(outcome, "holds the value of $HF_TOKEN")
        assert_nowhere(planted, tmp_path / "multirun", *outcome[1:])
    (tmp_path / "flat.yaml").write_text(f"experiment_name: {HF}\n")
    for mode in ([], ["-m"]):
        outcome = command(["--config", "flat.yaml", *mode])
        assert_mistake(outcome, "holds the value of $HF_TOKEN")
        assert_nowhere(planted, tmp_path / "multirun", *outcome[1:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "harmless-value"),
        ("HF_TOKEN_PATH", "/a/harmless/path"),
        ("MY_SECRET", "short"),
        ("OLDPWD", "/a/harmless/path (1)"),
        ("MAX_TOKENS", "1000000000"),
        ("ANYTHING", "harmless-value"),
    ],
)
def test_what_is_no_secret_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    text = f"{value} https://huggingface.co/x git@host:x/y 81ca0264f621816b6c89d9dc0a283c70d9d9081ca hf_short"
    assert redact(text) == text


def test_a_value_inside_another_goes_with_it(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghijkl")
    assert redact("x abcdefghijkl y abcdefgh z") == "x *** y *** z"
