"""Pages read back by an HTML parser."""

import json
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags, links, tables, words and JSON of a page.

    Args:
        text: HTML, or the file that holds it.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
        self.tags, self.ids, self.links, self.tables, self.json = [], [], [], [], []
        self.words, self.cell = "", None
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append((tag, known))
        self.ids += [known["id"]] if "id" in known else []
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action") and v]
        if tag == "table":
            self.tables.append((known.get("class", ""), []))
        if tag == "tr" and self.tables:
            self.tables[-1][1].append([])
        if tag == "td":
            self.cell = ""

    def handle_endtag(self, tag):
        if tag == "td":
            self.tables[-1][1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, words):
        if self.cdata_elem:
            if self.tags[-1][1].get("type") == "application/json":
                self.json.append(json.loads(words))
            return
        self.words += words
        if self.cell is not None:
            self.cell += words

    def classes(self, name, tag=None):
        """Attributes of the elements of a class."""
        return [k for t, k in self.tags if k.get("class") == name and tag in (None, t)]

    def rows(self, kind):
        """Cells of the tables of a class."""
        return [row for name, rows in self.tables if name == kind for row in rows if row]
