"""Each check with the facts of a machine that is well and of one that is not."""

import errno
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ssl_xcit.doctor import checks
from ssl_xcit.doctor.checks import Driver, Line

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
TORCH = {
    "torch": "2.14.1+cu130", "torchvision": "0.29.1", "lightning": "2.6.6", "cuda": "13.0",
    "threads": 8, "gpus": [], "bfloat16": True, "cpu_gflops": {"float32": 90.0, "bfloat16": 200.0},
}  # fmt: skip
ON_GPU = TORCH | {"gpus": ["H200"] * 2, "gpu_gflops": {"float32": 5e4, "bfloat16": 7e5}}
FAISS = {"faiss": "1.15.1", "gpu_build": True, "gpus": 0, "right": True}
DECODERS = {
    "pillow": "13.0.0", "libjpeg_turbo": "3.2.0", "opencv": "5.0.0", "pillow_heif": None,
    "simplejpeg": "1.9.0", "by_simplejpeg": {"JPEG": ""},
    "by_pillow": {"JPEG": "", "WEBP": "", "AVIF": ""}, "by_opencv": {"PNG": ""},
}  # fmt: skip
NEW, OLD = Driver(["H200"], "580.65", "13.0"), Driver(["V100"], "535.104", "12.2")


def words(line):
    return f"{line.facts} -> {line.fix}"


def gpu(facts, driver, **environment):
    lines = list(checks.check_torch(facts, driver, environment))
    return next(line for line in lines if line.what == "GPU")


@pytest.mark.parametrize(
    ("facts", "driver", "environment", "state", "said"),
    [
        (TORCH, Driver([]), {}, "note", "none"),
        (ON_GPU, NEW, {}, "ok", "2 x H200, driver 580.65 for CUDA up to 13.0"),
        (TORCH | {"cuda": None}, NEW, {}, "problem", "built without CUDA -> .*/cu130"),
        (TORCH | {"cuda": None}, OLD, {}, "problem", "built without CUDA -> .*/cu126"),
        (TORCH, OLD, {}, "problem", "CUDA 13.0, which the driver is too old for -> .*/cu126"),
        (TORCH, Driver(["K80"], "470", "11.4"), {}, "problem", "-> install a newer driver"),
        (TORCH, NEW, {}, "problem", "torch does not find it -> nvidia-smi"),
        (TORCH, NEW, {"CUDA_VISIBLE_DEVICES": ""}, "note", "-> unset CUDA_VISIBLE_DEVICES"),
        (ON_GPU | {"gpu_error": "no kernel image"}, NEW, {}, "problem", "no kernel image"),
        (TORCH, Driver(["/dev/nvidia0"]), {}, "problem", "/dev/nvidia0"),
    ],
)  # fmt: skip
def test_the_gpu_of_the_driver_against_torch(facts, driver, environment, state, said):
    line = gpu(facts, driver, **environment)
    assert line.state == state
    assert re.search(said, words(line)), words(line)


def test_a_torch_that_cannot_be_imported():
    (line,) = checks.check_torch({"error": "OSError: libcudart.so.13"}, NEW, {})
    assert line.state == "problem"
    assert "libcudart.so.13 -> pip install" in words(line)


SMI = """#!/bin/sh
case "$1" in
  --query*) printf 'NVIDIA H200, 580.65.06\\nNVIDIA H200, 580.65.06\\n' ;;
  *) echo '| NVIDIA-SMI 580.65.06      Driver Version: 580.65.06      CUDA Version: 13.0     |' ;;
esac
"""


def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert checks.driver_here() == Driver(["NVIDIA H200"] * 2, "580.65.06", "13.0")


def test_a_driver_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(checks, "DEVICES", tmp_path)
    monkeypatch.setattr(checks, "DRIVER", tmp_path / "version")
    assert checks.driver_here() == Driver([])
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05")
    gpus = [str(tmp_path / "nvidia0"), str(tmp_path / "nvidia1")]
    assert checks.driver_here() == Driver(gpus, "535.104.05")


def test_faiss():
    assert checks.check_faiss(FAISS, gpus=0).state == "ok"
    assert checks.check_faiss(FAISS, gpus=1).state == "note"
    for facts in ({"error": "ended the interpreter with SIGABRT"}, FAISS | {"right": False}):
        line = checks.check_faiss(facts, gpus=0)
        assert line.state == "problem"
        assert "-> pip install --force-reinstall faiss-" in words(line)


def test_cores_and_memory_against_cgroup_limits():
    assert checks.check_cores("EPYC", 64, 64, None, "fpu avx2").facts == (
        "EPYC, 64 cores, 64 usable, avx2"
    )
    line = checks.check_cores("EPYC", 64, 3, 3.5, "")
    assert line.state == "note"
    assert "64 cores, 3 usable, cgroup limit 3.5" in line.facts
    assert checks.check_memory(64 * GB, 50 * GB, None).state == "ok"
    assert checks.check_memory(64 * GB, 50 * GB, 2 * GB).state == "note"
    assert "cgroup limit 2.0 GB" in checks.check_memory(64 * GB, 50 * GB, 2 * GB).facts


def test_the_compiler_of_kernels():
    assert checks.check_cpp_compiler("g++", "g++ (Debian) 12.2.0").state == "ok"
    line = checks.check_cpp_compiler("g++", None)
    assert line.state == "note"
    assert "-> apt install g++" in words(line)


def test_what_kernels_gain():
    line = checks.check_kernels({"speed": 1.5, "taken": True})
    assert line.facts == (
        "a block is 1.50 times as fast by them as by torch alone; compile=auto takes them"
    )
    assert "compile=auto leaves them" in checks.check_kernels({"speed": 0.7, "taken": False}).facts
    for facts, said in (
        ({"error": "did not answer"}, "did not answer"),
        ({"speed": None, "taken": False, "why": ["g++ did not build"]}, "g++ did not build"),
        ({"speed": 0.0, "taken": False, "why": ["waiting", "in a trial: no end"]}, "no end"),
    ):
        line = checks.check_kernels(facts)
        assert line.state == "note"
        assert said in line.facts
        assert "CXX" in line.fix


def test_dockers_64_mb_of_shared_memory():
    line = checks.check_shared_memory(64 << 20, 64 << 20, num_workers=1, batch_size=64)
    assert line.state == "problem"
    assert "67 MB free; up to 134 MB for 1 worker" in line.facts
    assert "--shm-size=8g" in line.fix
    assert checks.check_shared_memory(64 << 20, 64 << 20, 0, 64).state == "ok"
    assert checks.check_shared_memory(8 * GB, 8 * GB, 12, 64).state == "ok"
    assert checks.check_shared_memory(8 * GB, 8 * GB, 1, 64, writable=False).state == "problem"
    assert checks.shared_memory_here(Path("/none")) is None


def test_the_room_for_an_image_is_that_of_the_default_crops():
    augment = OmegaConf.load(ROOT / "conf/augment/fused.yaml")
    local = augment.num_local * augment.local_size**2
    assert 3 * (2 * augment.global_size**2 + local) == checks.BYTES_AN_IMAGE
    defaults, pretrain = (OmegaConf.load(ROOT / f"conf/{c}.yaml") for c in ("doctor", "pretrain"))
    assert all(defaults[k] == pretrain[k] for k in ("out", "batch_size", "num_workers"))


def disk(monkeypatch, free, total=500 * GB, speed=(900e6, 900e6)):
    room = SimpleNamespace(f_bavail=free, f_blocks=total, f_frsize=1)
    monkeypatch.setattr(checks.os, "statvfs", lambda path: room)
    monkeypatch.setattr(checks, "disk_speed", lambda path: (speed[0] / 1e6, speed[1] / 1e6))


@pytest.mark.parametrize(
    ("free", "speed", "state"),
    [
        (300 * GB, (900e6, 900e6), "ok"),
        (300 * GB, (8e6, 900e6), "note"),
        (10 * GB, (900e6, 900e6), "note"),
        (1 * GB, (900e6, 900e6), "problem"),
    ],
)
def test_room_and_speed_of_a_disk(free, speed, state, tmp_path, monkeypatch):
    disk(monkeypatch, free, speed=speed)
    line = checks.check_disk("runs", tmp_path / "runs", "out=DIR")
    assert line.state == state
    assert bool(line.fix) == (state != "ok")


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "is full"), (errno.EROFS, "cannot be written")]
)
def test_a_disk_that_takes_nothing(number, said, tmp_path, monkeypatch):
    disk(monkeypatch, 0)

    def fails(folder):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checks, "disk_speed", fails)
    line = checks.check_disk("runs", tmp_path / "runs", "out=DIR")
    assert line.state == "problem"
    assert said in line.facts
    assert "out=DIR" in line.fix


def test_measuring_a_disk_leaves_nothing(tmp_path):
    write, read = checks.disk_speed(tmp_path)
    assert write > 0
    assert read > 0
    assert not list(tmp_path.iterdir())


MOUNTED = """
set -e
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount -t tmpfs -o size=1m tmpfs "$1"
exec "$2" -c "
import sys
from pathlib import Path
from ssl_xcit.doctor import checks
print(checks.check_shared_memory(*checks.shared_memory_here()[:2], 1, 64))
print(checks.check_disk('runs', Path(sys.argv[1]) / 'runs', 'out=DIR'))
" "$1"
"""


def test_small_shared_memory_and_a_full_disk_as_the_kernel_has_them(tmp_path):
    command = ["unshare", "--mount", "sh", "-c", MOUNTED, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"file systems can be mounted by root only: {done.stderr.strip()[-80:]}")
    shared, runs = done.stdout.splitlines()
    assert shared.startswith("problem  shared memory  /dev/shm has 67 MB, 67 MB free")
    assert "the disk or quota is full" in runs


def test_decoders():
    assert [line.state for line in checks.check_decoders(DECODERS)] == ["ok"] * 3
    broken = DECODERS | {"by_opencv": {"PNG": "decoded to other pixels"}}
    pillow, _, opencv = checks.check_decoders(broken)
    assert (pillow.state, opencv.state) == ("ok", "problem")
    assert "PNG: decoded to other pixels -> pip install" in words(opencv)
    slow, *_ = checks.check_decoders(DECODERS | {"libjpeg_turbo": None})
    assert slow.state == "note"
    old, *_ = checks.check_decoders(DECODERS | {"by_pillow": {"JPEG": ""}})
    assert "without WEBP, AVIF -> pip install --upgrade pillow" in words(old)


METADATA = """Metadata-Version: 2.1
Name: ssl-xcit
Version: 1.0
Requires-Dist: numpy>=1.26
Requires-Dist: rich>=999
Requires-Dist: absent; sys_platform == 'none'
Provides-Extra: video
Requires-Dist: pytest>=1; extra == "video"
Provides-Extra: tiff
Requires-Dist: not-there>=2; extra == "tiff"
Provides-Extra: dev
Requires-Dist: gone; extra == "dev"
"""


def test_requirements_and_extras_are_those_of_the_metadata(tmp_path):
    folder = tmp_path / "ssl_xcit-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    wrong, there, tiff = checks.check_requirements(Distribution.at(folder))
    assert wrong.state == "problem"
    assert wrong.fix == "pip install 'rich>=999'"
    assert there == Line("ok", "extras", "installed: video")
    assert (tiff.state, tiff.what) == ("note", "[tiff]")
    assert tiff.fix == "pip install 'ssl-xcit[tiff]'"


def test_a_key_for_wandb_is_found_and_not_shown(tmp_path):
    def check(**environment):
        return checks.check_wandb(environment, tmp_path)

    assert check().fix == "wandb login"
    assert check(WANDB_API_KEY="5ecret").state == "ok"
    assert "5ecret" not in str(check(WANDB_API_KEY="5ecret"))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 5ecret\n")
    assert check().state == "ok"
    assert "5ecret" not in str(check())
    assert check(WANDB_BASE_URL="https://wandb.example.org:8080").state == "note"


def test_a_home_folder_is_not_shown(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert checks.shown(Path("/home/ada/runs")) == "~/runs"
    assert checks.shown(Path("/home/adam/runs")) == "/home/adam/runs"


def test_a_folder_that_cannot_be_written(tmp_path):
    assert checks.check_working_folder(tmp_path).state == "ok"
    assert checks.check_working_folder(tmp_path / "none").state == "problem"
