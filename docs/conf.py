"""How Sphinx makes the documentation site (scripts/docs.sh) from README.md, docs/ and the docstrings of the public names.

The source folder is the repository, so that links between pages work in the site as they do on GitHub.
"""

import re
import shutil

from sphinx.application import Sphinx

project = "pretrain"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/*.rst"]
exclude_patterns = [".*", "outputs", "multirun", "build", "dist", "site"]  # not searched: they may be large

html_theme = "furo"
html_title = "pretrain"
html_copy_source = False
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"

TOPIC = re.compile(r"^\| ([\w ]+) \| (\[.*\.md\).*) \|$", re.MULTILINE)  # a row of the README's table of pages
TREE = "\n```{{toctree}}\n:hidden:\n:caption: {topic}\n\n{pages}\n```\n"


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make the navigation from the README's table of pages. A page that is missing there fails the build."""
    if docname == root_doc:
        _, _, table = source[0].partition("## Documentation")
        for topic, row in TOPIC.findall(table):
            pages = re.findall(r"\]\(([\w/]+)\.md\)", row)
            pages += ["docs/api"] if topic == "from Python" else []
            source[0] += TREE.format(topic=topic.capitalize(), pages="\n".join(pages))


def add_index(app: Sphinx, exception: Exception | None) -> None:
    """Serve the README as index.html too: its links are relative, so the copy is as good."""
    if exception is None:
        shutil.copyfile(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
