"""A labelled set of real pictures, for benchmarks: those of Debian's packages openclipart-png and
tuxpaint-stamps-default, their category folders as classes.

    apt-get install openclipart-png tuxpaint-stamps-default
    python benchmarks/debian_pictures.py [--out runs/debian_pictures] [--side 96] [--largest 120]

Each picture is put on white, its longer side `side` pixels; a class has at least `--smallest`
pictures, at most `--largest` are taken, evenly spaced by name; of the same picture the first.
"""

import argparse
import hashlib
from collections import defaultdict
from pathlib import Path

from PIL import Image

ROOTS = (Path("/usr/share/openclipart/png"), Path("/usr/share/tuxpaint/stamps"))
MAX_PIXELS = 20_000_000


def on_white(path: Path, side: int) -> Image.Image | None:
    """The picture, small; none where it is too large or cannot be read."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            rgba = image.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return None
    rgba.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3)
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/debian_pictures"))
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--smallest", type=int, default=20)
    parser.add_argument("--largest", type=int, default=120)
    args = parser.parse_args()
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty: name another folder")
    classes: dict[str, list[Path]] = defaultdict(list)
    for root in ROOTS:
        for path in sorted(root.rglob("*.png")):
            parts = path.relative_to(root).parts
            if len(parts) > 2 and path.is_file():
                classes["_".join(parts[:2])].append(path)
    seen: set[bytes] = set()
    counts = {}
    for name, paths in sorted(classes.items()):
        every = max(1.0, len(paths) / args.largest)
        taken = [paths[int(i * every)] for i in range(round(len(paths) / every))]
        images = []
        for path in taken:
            image = on_white(path, args.side)
            if image is not None and min(image.size) >= args.side // 8:
                digest = hashlib.sha256(image.tobytes()).digest()
                if digest not in seen:
                    seen.add(digest)
                    images.append(image)
        if len(images) >= args.smallest:
            folder = args.out / name
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images):
                image.save(folder / f"{number:03d}.png")
            counts[name] = len(images)
    print(f"{args.out}: {sum(counts.values())} pictures in {len(counts)} classes")


if __name__ == "__main__":
    main()
