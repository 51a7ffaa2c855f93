"""A folder for the Hugging Face hub: `AutoModel`, timm and ssl_xcit all load it.

Tensors have timm's names and `config.json` is of timm's wrapper in transformers, so that no code of
ours has to be trusted; the header of the safetensors file is what ssl_xcit reads.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export.exported import (
    Made,
    Weights,
    beside,
    compare,
    needs,
    numbers_of,
    save_tensors,
    title,
    with_ending,
)  # fmt: skip
from ssl_xcit.export.weights_files import header, timm_arguments
from ssl_xcit.models.names import to_timm_names
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.table import format_value, shown_interval, title_of
from ssl_xcit.terminal import literal, printable

CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- timm
- xcit
- self-supervised-learning
- ssl-xcit
---

# {name}

{model}, {parameters:.1f} M parameters: features of images{origin}.
The architecture is XCiT (arXiv:2106.09681). Output: the class token, {width} numbers an image.
Images may have any size; the preprocessing makes them {size} x {size} pixels.

{numbers}
## Use

```python
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{where}").eval()
processor = AutoImageProcessor.from_pretrained("{where}")
features = model(**processor(image)).pooler_output  # (1, {width})
```

```python
import timm

model = timm.create_model("{timm}", pretrained=True).eval()
```

```python
import ssl_xcit  # attention maps, patch features, evaluation
{download}
model = ssl_xcit.load_backbone({folder})
```

## How it was made

{recipe}

License: to be named by whoever publishes this.
"""
FILES = ("config.json", "model.safetensors", "README.md")


def huggingface(weights: Weights, out: Path, push: str | None = None, private: bool = True) -> Made:
    """`NAME-huggingface/`: config, weights and model card; uploaded only when asked.

    Args:
        weights: what to write.
        out: where, without ending.
        push: `USER/NAME` on the hub; the token is that of `hf auth login` or of HF_TOKEN.
        private: whether a repository made by this is.

    Raises:
        UserError: a library is missing, timm has no such stem, or the hub refuses.
    """
    if push is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", push):
        raise UserError(f"push={push}: USER/NAME on the Hugging Face hub")
    needs("transformers", "transformers", "timm")
    if push is not None:
        needs("hub", "huggingface_hub")
    name, arguments = timm_arguments(weights)
    path = with_ending(out, "-huggingface")
    with beside(path, FILES) as part:
        part.mkdir()
        save_tensors(to_timm_names(weights.state()), part / "model.safetensors", header(weights))
        write_json(part / "config.json", config(weights, name, arguments))
        (part / "README.md").write_text(card(weights, push or path.name, push))
        loaded = auto_model(part)
        checked = compare(weights, loaded)
        compare(weights, load_backbone(part))
    made = Made(
        [path],
        f"loaded by transformers' AutoModel, and by ssl_xcit: {checked}",
        "from transformers import AutoModel\n"
        f'model = AutoModel.from_pretrained("{path}").eval()\n'
        "features = model(pixel_values=images).pooler_output",
    )
    if weights.how.channels != 3:
        made.notes.append("AutoImageProcessor reads RGB only; feed normalised tensors")
    if push is not None:
        made.notes.append(f"pushed: {upload(path, push, private)}")
    return made


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """In a folder that is being made."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def config(weights: Weights, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """As timm and transformers' wrapper of it read it."""
    mean, std = weights.how.statistics()
    chans = weights.architecture["in_chans"]
    more = {k: v for k, v in arguments.items() if k != "num_classes"}
    return {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        "architecture": name,
        "num_classes": 0,
        "num_features": weights.backbone.embed_dim,
        "global_pool": "token",
        **({"model_args": more} if more else {}),
        "pretrained_cfg": {
            "input_size": [chans, weights.size, weights.size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": crop_share(weights.resize, weights.size),
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj.0.0",
            "classifier": "head",
        },
    }


def crop_share(resize: int, size: int) -> float:
    """What timm divides `size` by to have `resize`, rounded down."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0.0)


def auto_model(folder: Path) -> Any:
    """As a function of tensors."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def run(images: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=images).pooler_output

    return run


def card(weights: Weights, name: str, pushed: str | None) -> str:
    """The model card, with the run's numbers."""
    where = pushed or "FOLDER"
    values, intervals = numbers_of(weights.about)
    rows = [
        f"| {literal(title_of(metric).strip())} | {format_value(metric, value)} | "
        f"{shown_interval(metric, intervals.get(metric))} |"
        for metric, value in values.items()
        if not metric.endswith(("_std", "_lr", "_l2"))
    ]
    numbers = "It was not measured.\n"
    if rows:
        data = literal(str(weights.about.get("data")))
        head = [f"Frozen features on {data}, in %:", "", "| | | 95 % |"]
        numbers = "\n".join([*head, "|---|---:|---|", *rows, ""])
    of_run = weights.about.get("overrides") is not None
    own = (v for k, v in weights.backbone.named_parameters() if not k.startswith("head."))
    return CARD.format(
        name=literal(name.rsplit("/", 1)[-1]),
        model=title(weights),
        origin=", pretrained without labels by DINO (arXiv:2104.14294) with ssl_xcit" * of_run,
        parameters=sum(v.numel() for v in own) / 1e6,
        width=weights.backbone.embed_dim,
        size=weights.size,
        numbers=numbers,
        where=where,
        timm=f"hf-hub:{pushed}" if pushed else "local-dir:FOLDER",
        download="from huggingface_hub import snapshot_download\n" if pushed else "",
        folder=f'snapshot_download("{pushed}")' if pushed else '"FOLDER"',
        recipe="\n".join(recipe(weights.about)),
    )


def recipe(about: Mapping[str, Any]) -> Iterator[str]:
    """A line for each thing that is known of how the weights came about."""
    titles = {
        "model": "network", "which": "of teacher and student",
        "file": "weights", "sha256": "their SHA-256", "overrides": "settings beside the defaults",
        "steps": "steps", "epochs": "epochs", "versions": "versions",
    }  # fmt: skip
    for key, words in titles.items():
        value = about.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            words_of = [str(v) for v in value]
            value = " ".join(literal(v) if "`" in v else f"`{printable(v)}`" for v in words_of)
        elif isinstance(value, float):
            value = f"{value:.6g}"
        elif value is not None:
            value = literal(str(value))
        if value not in (None, ""):
            yield f"- {words}: {value}"


def upload(folder: Path, push: str, private: bool) -> str:
    """To the hub; the address.

    Raises:
        RunFailed: it is not there, or does not take it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(push, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=push, folder_path=folder))
    except Exception as error:  # a dozen types of two libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunFailed(
            f"push={push}: {reason}; the folder is {folder}, and after `hf auth login` "
            f"`hf upload {push} {folder}` sends it"
        ) from error
