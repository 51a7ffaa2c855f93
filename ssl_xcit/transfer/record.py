"""What a checkpoint says of its task, without the libraries that the tasks take."""

from collections.abc import Mapping
from typing import Any


def transfer_record(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`kind`, `class_names` and `settings` of the task in a checkpoint; None: it has none."""
    record = content.get("transfer")
    if not isinstance(record, Mapping) or not isinstance(record.get("kind"), str):
        return None
    names, settings = record.get("class_names"), record.get("settings")
    if not isinstance(names, list) or not isinstance(settings, Mapping):
        return None
    return record
