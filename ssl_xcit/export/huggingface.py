"""Export a folder for the Hugging Face hub, which `AutoModel`, timm and ssl_xcit load.

Tensors have timm's names and `config.json` is of timm's wrapper in transformers, so nobody has to
trust code of ours; ssl_xcit reads the metadata of the safetensors file.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export.comparison import Run, compare
from ssl_xcit.export.description import Weights
from ssl_xcit.export.output_files import (
    Exported,
    replacing_path,
    require,
    save_tensors,
    with_ending,
)
from ssl_xcit.export.safetensors_files import loaded, metadata, timm_arguments
from ssl_xcit.models.timm_keys import to_timm_names
from ssl_xcit.utils.tables import format_value, interval_text, title_of
from ssl_xcit.utils.terminal import literal, printable

OF_FEATURES = (
    "k-NN and probes are of the features that tell training images best: class token, mean patch "
    "token or both."
)
CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- {pipeline}
- timm
- xcit
{tag}- ssl-xcit
---

# {name}

{model}, {parameters:.1f} M parameters: {purpose}{origin}.
The architecture is XCiT (arXiv:2106.09681). Output: {output}.
Images may have any size; the preprocessing makes them {size} x {size} pixels.

{numbers}
## Use

```python
from transformers import AutoImageProcessor, {auto}

model = {auto}.from_pretrained("{where}").eval()
processor = AutoImageProcessor.from_pretrained("{where}")
{result} = model(**processor(image)).{field}  # (1, {width})
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
PRETRAINED = "pretrained"  # the row of results that is of the weights


def huggingface(
    weights: Weights, out: Path, push: str | None = None, private: bool = True
) -> Exported:
    """Write `NAME-huggingface/` with config, weights and model card; upload it only on demand, to
    `push`, `USER/NAME` on the hub, with the token of `hf auth login` or of HF_TOKEN.

    Raises:
        UserError: a library is missing, timm has no such stem, or the hub refuses.
    """
    if push is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", push):
        raise UserError(f"push={push} must be USER/NAME of a repository on the Hugging Face hub")
    require("transformers", "transformers", "timm")
    if push is not None:
        require("hub", "huggingface_hub")
    notes, weights = weights.left_out(), weights.of_backbone()
    name, arguments = timm_arguments(weights)
    path = with_ending(out, "-huggingface")
    with replacing_path(path, FILES) as part:
        part.mkdir()
        save_tensors(to_timm_names(weights.state()), part / "model.safetensors", metadata(weights))
        (part / "config.json").write_text(
            json.dumps(config(weights, name, arguments), indent=2) + "\n"
        )
        (part / "README.md").write_text(card(weights, push or path.name, push))
        auto, result, field = interface(weights)
        checked = compare(weights, auto_model(part, auto, field))
        compare(weights, loaded(part))
    exported = Exported(
        [path],
        f"loaded by transformers' {auto}, and by ssl_xcit: {checked}",
        f"from transformers import {auto}\n"
        f'model = {auto}.from_pretrained("{path}").eval()\n'
        f"{result} = model(pixel_values=images).{field}",
        notes,
    )
    if weights.preprocess.channels != 3:
        exported.notes.append("AutoImageProcessor reads RGB only; feed normalised tensors")
    if push is not None:
        exported.notes.append(f"pushed: {upload(path, push, private)}")
    return exported


def interface(weights: Weights) -> tuple[str, str, str]:
    """The class of transformers that loads it, our name of its output, and the class's."""
    if weights.num_classes:
        return "AutoModelForImageClassification", "logits", "logits"
    return "AutoModel", "features", "pooler_output"


def config(weights: Weights, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of timm, and of its wrapper in transformers."""
    mean, std = weights.preprocess.statistics()
    chans = weights.architecture["in_chans"]
    more = {k: v for k, v in arguments.items() if k != "num_classes"}
    K, task = weights.num_classes, weights.about_task()
    names, several = task.get("class_names"), task.get("multi_label", False)
    return {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperForImageClassification" if K else "TimmWrapperModel"],
        "architecture": name,
        "num_classes": K,
        **({"label_names": names} if names else {}),
        **({"problem_type": "multi_label_classification"} if several else {}),
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
            "num_classes": K,
            "first_conv": "patch_embed.proj.0.0",
            "classifier": "head",
        },
    }


def crop_share(resize: int, size: int) -> float:
    """size / resize, such that timm's floor(size / share) is `resize`."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0.0)


def auto_model(folder: Path, auto: str, field: str) -> Run:
    """A folder as a function of tensors, loaded by a class of transformers."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = getattr(transformers, auto).from_pretrained(folder, local_files_only=True).eval()

    def run(images: torch.Tensor) -> torch.Tensor:
        return getattr(model(pixel_values=images), field)

    return run


def card(weights: Weights, name: str, pushed: str | None) -> str:
    """The model card with the numbers of these weights."""
    where = pushed or "FOLDER"
    K, auto, result, field = weights.num_classes, *interface(weights)
    measured = "classification" if K else PRETRAINED  # the row of results that is of the weights
    values, intervals = (
        (weights.about.get(key) or {}).get(measured, {}) for key in ("results", "intervals")
    )
    rows = [
        f"| {literal(title_of(metric).strip())} | {format_value(metric, value)} | "
        f"{interval_text(metric, intervals.get(metric))} |"
        for metric, value in values.items()
        if not metric.endswith(("_std", "_lr", "_l2"))
    ]
    numbers = "It was not measured.\n"
    if rows:
        data = literal(str(weights.about.get("data")))
        title = f"Test images of {data}, in %:" if K else f"Frozen features on {data}, in %:"
        head = [title, "", "| | | 95 % |"]
        numbers = "\n".join([*head, "|---|---:|---|", *rows, ""])
        if not K:
            numbers += f"\n{OF_FEATURES}\n"
    width = weights.backbone.embed_dim
    of_run = weights.about.get("overrides") is not None
    objective = weights.about.get("objective") or "dino"
    trained = "" if K else f", pretrained without labels with ssl_xcit (objective={objective})"
    several = weights.about_task().get("multi_label", False)
    classes = f"{'any' if several else 'one'} of {K:,} classes for each image"
    buffers = dict(weights.backbone.named_buffers())
    return CARD.format(
        name=literal(name.rsplit("/", 1)[-1]),
        model=weights.model,
        pipeline="image-classification" if K else "image-feature-extraction",
        tag="" if K else "- self-supervised-learning\n",
        purpose=classes if K else "features of images",
        output="logits of the classes" if K else f"the class token, {width} numbers an image",
        auto=auto,
        result=result,
        field=field,
        origin=trained * of_run,
        parameters=sum(v.numel() for k, v in weights.state().items() if k not in buffers) / 1e6,
        width=K or width,
        size=weights.size,
        numbers=numbers,
        where=where,
        timm=f"hf-hub:{pushed}" if pushed else "local-dir:FOLDER",
        download="from huggingface_hub import snapshot_download\n" if pushed else "",
        folder=f'snapshot_download("{pushed}")' if pushed else '"FOLDER"',
        recipe="\n".join(recipe(weights.about)),
    )


def recipe(about: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each known fact about the training of the weights."""
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
            texts = map(str, value)
            value = " ".join(literal(t) if "`" in t else f"`{printable(t)}`" for t in texts)
        elif isinstance(value, float):
            value = f"{value:.6g}"
        elif value is not None:
            value = literal(str(value))
        if value not in (None, ""):
            yield f"- {words}: {value}"


def upload(folder: Path, push: str, private: bool) -> str:
    """Upload a folder to the hub, and return its address.

    Raises:
        RunFailed: the hub cannot be reached, or refuses it.
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
