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


@pytest.mark.parametrize(
    ("triton", "compiler", "capability", "missing"),
    [
        (True, True, (9, 0), None),
        (False, True, (7, 0), "pip install triton"),
        (True, False, (8, 0), "apt install gcc"),
        (True, True, (6, 1), "compute capability 7.0"),
        (False, False, (9, 0), "triton) and a C compiler"),
    ],
)
def test_what_compiling_on_a_gpu_lacks_is_said(
    triton, compiler, capability, missing, monkeypatch, caplog
):
    monkeypatch.setattr(hardware, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/cc" if compiler else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert hardware.compiles_on_gpu() == (missing is None)
    assert len(caplog.messages) == (missing is not None)
    if missing is not None:
        assert missing in caplog.text


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


V2 = {"job/cpu.max": "350000 100000", "cpu.max": "max 100000", "memory.max": "max",
      "job/memory.max": "2000000000"}  # fmt: skip
V1 = {"cpu/job/cpu.cfs_quota_us": "350000", "cpu/job/cpu.cfs_period_us": "100000",
      "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
      "memory/job/memory.limit_in_bytes": "2000000000",
      "memory/memory.limit_in_bytes": str(2**63 - 4096)}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "own"),
    [(V2, "0::/job/step"), (V1, "4:memory:/job\n3:cpu,cpuacct:/job"), (V2, "0::/job")],
)
def test_limits_of_cgroups_of_both_versions(files, own, tmp_path):
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert hardware.cpu_quota(tmp_path / "root", tmp_path / "own") == 3.5
    assert hardware.memory_limit(tmp_path / "root", tmp_path / "own") == 2_000_000_000
    (tmp_path / "own").write_text("0::/\n1:cpu:/\n2:memory:/\n")
    assert hardware.cpu_quota(tmp_path / "root", tmp_path / "own") is None
    assert hardware.memory_limit(tmp_path / "root", tmp_path / "own") is None
