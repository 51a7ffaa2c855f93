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
        self.tags, self.tables, self.json, self.words = [], [], [], ""
        self.feed(self.text)
        known = [pair for _, attributes in self.tags for pair in attributes.items()]
        self.ids = [value for key, value in known if key == "id"]
        self.links = [v for k, v in known if k in ("src", "href", "srcset", "action") and v]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append((dict(attrs).get("class", ""), []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag == "td":
            self.tables[-1][1][-1].append("")

    def handle_data(self, words):
        if not self.cdata_elem:
            self.words += words
            if self.lasttag == "td":
                self.tables[-1][1][-1][-1] += words.rstrip("\n")
        elif self.tags[-1][1].get("type") == "application/json":
            self.json.append(json.loads(words))

    def rows(self, kind):
        """Cells of the tables of a class."""
        return [row for name, rows in self.tables if name == kind for row in rows if row]
