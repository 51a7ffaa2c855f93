"""Fill the templates of pages: escaped words, and pictures and data of scripts inside the page.

What comes from files and settings may hold anything; it goes into a page through a template only.
"""

import base64
import io
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import writable_folder, writable_or_here
from ssl_xcit.utils.terminal import printable

from .pictures import Picture, thumbnail

KINDS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
MAX_PIXELS = 16_000_000  # of a picture that is taken from a file


def page_path(out: object, folder: Path, name: str) -> Path:
    """A page's file in a folder that can be written: `out`, or else `name` in `folder`."""
    if not out:
        return writable_or_here(folder) / name
    file = html_path(out)
    writable_folder(file.parent)
    return file


def html_path(out: object) -> Path:
    """The file that `out=` names for a page; raises UserError for a folder, or another ending."""
    path = Path(str(out)).expanduser()
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise UserError(f"out={out} must be a file ending in .html")
    return path


@cache
def templates() -> Environment:
    """The files of `templates/`, in which every value is escaped unless it is `Markup`, and a
    character that is not seen appears as its escape. `asset` can be called.
    """
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: printable(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
    )
    environment.globals["asset"] = lambda name: Markup(asset(name))
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def render(template: str, **values: Any) -> Markup:
    """Fill a file of `templates/`; the result is not escaped again in another one."""
    return Markup(templates().get_template(template).render(values))


def render_macro(template: str, macro: str, **values: Any) -> Markup:
    """Fill a macro of a file of `templates/`."""
    filled: Markup = getattr(templates().get_template(template).module, macro)(**values)
    return filled


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
    """The picture in a file as a URI: as it is where its long side is at most `side`, else smaller;
    raises OSError where it cannot be read, is no JPEG, PNG or WebP, or is larger than any that we
    write.
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
