"""Upload of a model folder to a repository of the Hub, through huggingface_hub. A failure never ends a run."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.redact import find_secret, redact, secrets

TEXTS = (".json", ".md", ".txt", ".jinja", ".py")  # files that are searched for secrets


@dataclass
class Pusher:
    """Uploads the models of a run to the repository ``repo`` (owner/name). A new repository is private; one that exists keeps its
    visibility. The token is that of huggingface_hub: ``HF_TOKEN``, or ``hf auth login``."""

    repo: str
    _thread: Thread | None = field(default=None, init=False)

    def start(self, folder: Path, message: str) -> None:
        """Upload ``folder`` while training continues. If the upload before is not done yet, this one is skipped."""
        if self._thread is not None and self._thread.is_alive():
            notice(
                f"checkpoint.push_to_hub={self.repo}: the upload before is still under way; {folder} is not uploaded"
            )
            return
        self._thread = Thread(target=self.push, args=(folder, message), name="push_to_hub", daemon=True)
        self._thread.start()

    def finish(self, folder: Path, message: str) -> None:
        """Wait for the upload that is under way, then upload ``folder``."""
        if self._thread is not None:
            self._thread.join()
        self.push(folder, message)

    def push(self, folder: Path, message: str) -> None:
        """Upload ``folder``; report where it is, or why it could not be uploaded and how to try again."""
        notice(f"uploading {folder} to {self.repo}")
        try:
            notice(f"uploaded: {upload(folder, self.repo, message)}")
        except Exception as error:  # huggingface_hub raises errors of many types
            retry = shlex.join(["hf", "upload", self.repo, str(folder), "--private"])
            notice(redact(f"checkpoint.push_to_hub={self.repo}: {one_line(error)}; to try again: {retry}"))


def upload(folder: Path, repo: str, message: str) -> str:
    """Upload ``folder`` as one commit and return its address. Raises ``UserError`` for a file with a secret in it."""
    from huggingface_hub import HfApi

    check_no_secrets(folder)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    api.create_repo(repo, private=True, exist_ok=True)
    return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)


def check_no_secrets(folder: Path) -> None:
    """Raise ``UserError`` if a text file in ``folder`` holds a secret of this process, or a text of a secret's form."""
    known = secrets()
    for file in sorted(folder.rglob("*")):
        if file.suffix in TEXTS and file.name != "tokenizer.json" and file.is_file():
            found = find_secret(file.read_text(encoding="utf-8", errors="replace"), known)
            if found is not None:
                raise UserError(f"{file} holds {found} and is not uploaded")
