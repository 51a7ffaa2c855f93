"""Pieces of HTML: escaped words, tables, pictures inside the page, data for its script.

What comes from files and settings may hold anything; it goes into the page through these functions
only.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ssl_xcit.errors import UserError
from ssl_xcit.utils.terminal import printable

from .pictures import Picture, thumbnail

KINDS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
MAX_PIXELS = 16_000_000  # of a picture that is taken from a file


def html_path(out: object) -> Path:
    """The file that `out=` names for a page.

    Raises:
        UserError: it is a folder, or has another ending.
    """
    path = Path(str(out)).expanduser()
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise UserError(f"out={out} must be a file ending in .html")
    return path


def esc(words: object) -> str:
    """Text in an element or an attribute, with escapes for characters that are not seen."""
    return html.escape(printable(str(words)))


@cache
def templates() -> Environment:
    """The files of `templates/`, in which every value is escaped unless it is `Markup`, and a
    character that is not seen appears as its escape. `asset` and `script_json` can be called.
    """
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: printable(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
    )
    environment.globals |= {
        "asset": lambda name: Markup(asset(name)),
        "script_json": lambda content: Markup(script_json(content)),
    }
    return environment


def render(template: str, **values: Any) -> Markup:
    """Fill a file of `templates/`; the result is not escaped again in another one."""
    return Markup(templates().get_template(template).render(values))


def all_printable(content: Any) -> Any:
    """Data for a script that only shows it, with each text in it as `printable` has it."""
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, Mapping):
        return {key: all_printable(value) for key, value in content.items()}
    return [all_printable(item) for item in content] if isinstance(content, list) else content


def script_json(content: Any) -> str:
    """JSON inside `<script>`: nothing in it ends the script or begins a comment.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def asset(name: str) -> str:
    """A file of the page's style or script."""
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def data_uri(content: bytes, kind: str) -> str:
    """The content of a file as a URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg_uri(picture: Picture, quality: int = 85) -> str:
    """A picture as the URI of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "JPEG", quality=quality)
    return data_uri(file.getvalue(), KINDS["JPEG"])


def file_uri(path: Path, side: int) -> str:
    """The picture in a file as a URI: as it is where its long side is at most `side`, else smaller.

    Raises:
        OSError: it cannot be read, is no JPEG, PNG or WebP, or is larger than any that we write.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=list(KINDS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels")
            image.load()
            if max(image.size) <= side:
                return data_uri(content, KINDS[str(image.format)])
            return jpeg_uri(thumbnail(np.asarray(image.convert("RGB")), side))
    except OSError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like
        raise OSError(f"{path.name}: {error}") from error


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False, kind: str = ""
) -> str:
    """A table that scrolls by itself where it is too wide; its cells are HTML.

    Args:
        headings: text; none: no head.
        rows: cells.
        numeric: all columns but the first are numbers.
        kind: more classes.
    """
    css = f"{kind} numeric".strip() if numeric else kind
    head = "".join(f"<th>{esc(word)}</th>" for word in headings)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    head = f"<thead><tr>{head}</tr></thead>" if headings else ""
    return f'<div class="wide"><table class="{esc(css)}">{head}<tbody>{body}</tbody></table></div>'


def details(title: str, inner: str, opened: bool = False) -> str:
    """A part that is folded away until it is clicked; the title is text."""
    return f"<details{' open' * opened}><summary>{esc(title)}</summary>{inner}</details>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of text."""
    return f'<p class="{esc(kind)}">{esc(words)}</p>' if kind else f"<p>{esc(words)}</p>"


def command_line(words: str) -> str:
    """A command to copy."""
    return (
        f'<div class="command"><code>{esc(words)}</code><button type="button" class="copy" '
        'aria-label="copy the command">copy</button></div>'
    )


def duration_in_words(seconds: float) -> str:
    """`3 min 2 s`, `5 h 12 min`, `2 d 3 h`."""
    left, parts = round(seconds), []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
