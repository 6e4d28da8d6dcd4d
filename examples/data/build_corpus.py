"""Make corpus.jsonl.xz from installed documentation packages: the paragraphs of every page, one document per page.

python examples/data/build_corpus.py --output examples/data/corpus.jsonl.xz NAME=FOLDER [NAME=FOLDER ...]

Code blocks, tables, lists of links and navigation are left out; what remains reads as English prose. The result is
deterministic: pages in the order of their paths, without repeated paragraphs.
"""

import argparse
import json
import lzma
import sys
from html.parser import HTMLParser
from pathlib import Path

MIN_WORDS = 40  # of a document


class Paragraphs(HTMLParser):
    """Collects the text of `<p>` elements outside tables and code blocks."""

    SKIPPED = frozenset({"pre", "table", "script", "style", "nav", "svg"})

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] | None = None
        self._skipped = 0

    def handle_starttag(self, tag, attrs):
        if tag in self.SKIPPED:
            self._skipped += 1
        elif tag == "p" and not self._skipped:
            self._finish()
            self._text = []

    def handle_endtag(self, tag):
        if tag in self.SKIPPED:
            self._skipped = max(0, self._skipped - 1)
        elif tag in ("p", "div", "li", "dd", "body"):
            self._finish()

    def handle_data(self, data):
        if self._text is not None and not self._skipped:
            self._text.append(data)

    def _finish(self):
        if self._text is not None:
            text = " ".join("".join(self._text).split())
            if len(text.split()) >= 4:
                self.paragraphs.append(text)
            self._text = None


def read_documents(name: str, folder: Path) -> list[dict]:
    """One document per page of `folder` with enough words, in the order of the paths."""
    documents, seen = [], set()
    for path in sorted(folder.rglob("*.html")):
        parser = Paragraphs()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        fresh = [text for text in dict.fromkeys(parser.paragraphs) if text not in seen]
        seen.update(fresh)
        text = "\n\n".join(fresh)
        if len(text.split()) >= MIN_WORDS:
            documents.append({"source": f"{name}/{path.relative_to(folder)}", "text": text})
    return documents


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("sources", nargs="+", metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    documents = []
    for source in arguments.sources:
        name, _, folder = source.partition("=")
        found = read_documents(name, Path(folder))
        print(f"{name}: {len(found)} documents, {sum(len(d['text']) for d in found) / 1e6:.2f} MB", file=sys.stderr)
        documents += found
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    arguments.output.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(
        f"{arguments.output}: {len(documents)} documents, {arguments.output.stat().st_size / 1e6:.2f} MB",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
