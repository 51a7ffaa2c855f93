"""The command `check`: inspect every image of a data set before a run meets the bad ones."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from ssl_xcit.data.bad_samples import FILE
from ssl_xcit.data.checks import inspect_all, summarize
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.settings import DataSettings
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import RunFailed
from ssl_xcit.utils.files import writable_folder, write_json
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say, track
from ssl_xcit.utils.validation import Count, Node, Positive, Text, Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckSettings:
    """`conf/check.yaml`."""

    main: str
    preprocess: Node
    data: DataSettings
    out: Text
    min_side: Count
    worker_timeout: Positive
    num_workers: Workers
    model: Any = None  # data options set these three for training
    augment: Any = None
    batch_size: Any = None


def main(settings: CheckSettings) -> None:
    """`ssl-xcit check`: print a summary, write what is bad and what is a duplicate.

    Raises:
        RunFailed: more than `data.max_bad_fraction` are bad; everything is written by then.
    """
    began = time.perf_counter()
    source: Source = instantiate(settings.data.source)
    preprocess: Preprocess = instantiate(settings.preprocess)
    out = Path(str(settings.out))
    writable_folder(out)
    images = inspect_all(source, preprocess, settings.num_workers, settings.worker_timeout)
    images = track(images, "checking images", len(source), shown_in_terminal())
    report, bad, groups = summarize(source, images, preprocess, settings.min_side)
    report["seconds"] = round(time.perf_counter() - began, 1)
    write_json(report, out / "report.json")
    (out / FILE).write_text("".join(json.dumps(row._asdict()) + "\n" for row in bad))
    (out / "duplicates.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    show(report, settings.min_side)
    if report["dark_images"]:
        log.warning("%s", report["dark_images"])
    say(f"written: {out}/report.json, {FILE}, duplicates.jsonl")
    allowed = settings.data.max_bad_fraction
    if len(bad) > allowed * len(source):
        raise RunFailed(
            f"{len(bad):,} of {len(source):,} images are bad, more than data.max_bad_fraction="
            f"{allowed:g} allows: repair or remove those in {out / FILE}"
        )


def show(report: dict[str, Any], min_side: int) -> None:
    """Print the report."""

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"

    say(f"{report['images']:,} images in {report['seconds']} s")
    say(f"  good        {report['good']:,}: {listed(report['kinds'])}")
    share = 100.0 * report["bad"] / max(report["images"], 1)
    say(f"  bad         {report['bad']:,} ({share:.2g} %): {listed(report['bad_by_reason'])}")
    if "median_size" in report:
        small, median, large = (
            "{} x {}".format(*report[f"{name}_size"]) for name in ("smallest", "median", "largest")
        )
        say(f"  sizes       {small} to {large}, median {median}")
        say(f"  small       {report['small_images']:,} have a side under {min_side} pixels")
    say(
        f"  duplicates  {report['duplicate_images']:,} images repeat another "
        f"({report['duplicate_groups']:,} groups)"
    )
