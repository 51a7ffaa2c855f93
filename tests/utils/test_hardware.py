"""Precision and compiler by what the machine has."""

from pathlib import Path

import pytest
import torch

from ssl_xcit.utils import hardware


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"),
    [(False, False, "32-true"), (True, False, "bf16-mixed"), (False, True, "bf16-mixed")],
)
def test_auto_takes_bfloat16_where_there_are_instructions(avx512_bf16, amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert hardware.precision_for("auto", on_cpu=True) == expected


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_on_a_gpu(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert hardware.precision_for("auto", on_cpu=False) == expected


def test_a_precision_that_is_asked_for_is_taken(monkeypatch, caplog):
    monkeypatch.setattr(hardware, "has_bfloat16", lambda on_cpu: False)
    assert hardware.precision_for("32-true", on_cpu=True) == "32-true"
    assert not caplog.records
    assert hardware.precision_for("bf16-mixed", on_cpu=True) == "bf16-mixed"
    assert "trainer.precision=auto" in caplog.text
    with pytest.raises(ValueError, match="float16 would need a loss scale"):
        hardware.precision_for("16-mixed", on_cpu=True)


def test_the_processor_agrees_with_the_kernels_list():
    """Where Linux lists what the processor has."""
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = "avx512_bf16" in flags or "amx_tile" in flags
    assert hardware.has_bfloat16(on_cpu=True) == expected


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no g\+\+"):
        hardware.check_compiler(on_cpu=True)
    hardware.check_compiler(on_cpu=False)
