"""The command `search`: the nearest neighbours of images in a file of `ssl-xcit embed`, as a table
and as a picture.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import replacing, writable_folder, written_to
from ssl_xcit.utils.tables import console
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Text

from ..evaluators.protocol import as_list
from ..features.neighbors import is_exact
from ..features.store import FeatureIndex
from ..viz.pictures import write_png
from ..viz.search_sheet import (
    extractor_of,
    nearest_names,
    query_features,
    query_files,
    search_sheet,
)


@dataclass(frozen=True)
class SearchSettings:
    """`conf/search.yaml`."""

    main: str
    index: Text
    image: Text | Sequence[Text]
    k: Count
    ckpt: Text | None
    out: Text | None
    device: str


def main(settings: SearchSettings) -> None:
    """`ssl-xcit search`: prints neighbours, writes a picture or JSON."""
    out = None if settings.out is None else Path(str(settings.out)).expanduser()
    if out is not None:
        if out.suffix not in (".png", ".json"):
            raise UserError(f"out={settings.out} must be a file ending in .png or .json")
        writable_folder(out.parent)  # now, not after the search
    index = FeatureIndex(Path(str(settings.index)).expanduser())
    files = query_files(as_list(settings.image))
    extractor = extractor_of(index, settings.ckpt, settings.device)
    features, rows = query_features(extractor, files, index.about)
    neighbours = nearest_names(index, features, min(settings.k, len(index.names)))
    if index.index is not None and not is_exact(index.index):
        say("an approximate index: some neighbours may be missing")
    results = [
        {"image": str(files[row]), "neighbours": near}
        for row, near in zip(rows, neighbours, strict=True)
    ]
    print_neighbours(results)
    if out is not None:
        with written_to(out):
            if out.suffix == ".json":
                text = json.dumps({"index": str(index.path), "found": results}, indent=2)
                with replacing(out) as part:
                    part.write_text(text)
            else:
                write_png(search_sheet(results, extractor, index), out)
        say(f"written: {out}")
    if len(rows) < len(files):
        unread = sorted(set(range(len(files))) - set(rows.tolist()))
        names = ", ".join(str(files[i]) for i in unread[:5])
        raise UserError(f"{len(unread)} of {len(files)} images cannot be read: {names}")


def print_neighbours(results: Sequence[dict[str, Any]]) -> None:
    """Print a table for each image."""
    for result in results:
        table = Table(title=result["image"], title_justify="left")
        for heading in ("", "cosine"):
            table.add_column(heading, justify="right")
        table.add_column("image", overflow="fold")
        for near in result["neighbours"]:
            table.add_row(str(near["rank"]), f"{near['similarity']:.3f}", near["name"])
        console().print(table)
