"""What MkDocs is told beside mkdocs.yml.

In the site, pages and pictures have the paths that they have in a checkout. So a relative link in a page, from the
README to ``docs/`` or from there to a picture in ``examples/``, is right in both. Addresses are shorter: README.md is
the first page, and ``docs/`` is left out.
"""

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = "*.md", "docs/*.md"
OTHERS = "CITATION.cff", "docs/site/*.css", "examples/pictures/*.png", "bench/results/*.png"
#: What a browser fetches when it opens a page.
FETCHED = re.compile(r"<(?:(?:script|img|iframe|source)\b[^>]*\ssrc|link\b[^>]*\shref)=\"?(?:https?:)?//")

log = logging.getLogger("mkdocs.hooks.fastbf")


def on_files(files: Files, config: Any) -> Files:
    """Replaces what MkDocs found in docs/ by the files of the site, under their paths in a checkout."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for pattern in (*PAGES, *OTHERS):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            file = File.generated(config, name, abs_src_path=str(path))
            file.dest_uri = _address(file.dest_uri)
            files.append(file)
    return files


def _address(name: str) -> str:
    return name.removeprefix("docs/").lower() if name.endswith(".html") else name


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warns, which fails the build, of a page that makes a browser fetch something from another site."""
    for fetched in FETCHED.finditer(output):
        log.warning("%s fetches from another site: %s", page.file.src_uri, output[fetched.start() :][:120])
    return output
