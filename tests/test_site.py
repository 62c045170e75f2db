"""The documentation site: it builds without a warning, and a link that leads nowhere fails the build."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, ("sphinx", "myst_parser", "furo"))), reason="bash scripts/setup.sh docs installs Sphinx"
    ),
]


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Like scripts/docs.sh."""
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--conf-dir", source / "docs"]
    words = [sys.executable, "-m", "sphinx", *options, source, site]
    return subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)


def test_site(tmp_path):
    import pretrain

    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "index.html").read_text()
    pages = [f"docs/{page.stem}.html" for page in (ROOT / "docs").glob("*.md")]
    assert len(pages) > 20
    for page in [*pages, "docs/api.html", "CONTRIBUTING.html", "CHANGELOG.html"]:
        assert f'href="{page}"' in index
        assert (tmp_path / page).exists()
    api = (tmp_path / "docs/api.html").read_text()
    assert [name for name in pretrain.__all__ if f'id="pretrain.{name}"' not in api] == []


def test_a_broken_link_fails_the_build(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "docs", source / "docs")
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source)
    with (source / "docs/data.md").open("a") as page:
        page.write("\n[a page](nowhere.md) and [a heading](runs.md#nothing)\n")
    (source / "docs/lost.md").write_text("# In no table of pages\n")
    done = build(source, tmp_path / "site")
    assert done.returncode == 1
    assert "'nowhere.md'" in done.stderr
    assert "'nothing'" in done.stderr
    assert "lost.md: WARNING: document isn't included in any toctree" in done.stderr
