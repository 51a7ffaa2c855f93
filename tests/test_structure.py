"""Who may import whom (docs/decisions.md), and what importing must not do."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ssl_xcit

ROOT = Path(__file__).resolve().parent.parent
EVAL = "ssl_xcit.eval"
MEASURING = {f"{EVAL}.features", f"{EVAL}.evaluators", f"{EVAL}.tasks"}
ALLOWED = {  # room -> rooms that it may know, besides itself, utils and errors
    "utils": set(),
    "data": set(),
    "models": set(),
    "objectives": set(),
    "training": {"objectives", "models", "data"},
    "doctor": {"models"},  # to try the kernels
    "export": {"models", "data", "training", "transfer"},
    "sweeps": {"training"},
    "transfer": {"data", "models", "training"},
    "commands": {"data", "doctor", "models", "training", "export", "sweeps", "transfer"},
    f"{EVAL}.features": set(),
    f"{EVAL}.evaluators": {f"{EVAL}.features"},
    f"{EVAL}.tasks": {f"{EVAL}.features", f"{EVAL}.evaluators"},
    EVAL: MEASURING,
    f"{EVAL}.viz": {*MEASURING, EVAL},
    f"{EVAL}.report": {*MEASURING, EVAL, f"{EVAL}.viz"},
    f"{EVAL}.commands": {*MEASURING, EVAL, f"{EVAL}.viz", f"{EVAL}.report"},
}


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "ssl_xcit" else ("ssl_xcit", *parts))


MODULES = {module_of(file): file for file in (*files("ssl_xcit"), *files("eval"))}


def imports(file, top_level_only=False):
    """Dotted names that a file imports; of `from a import b` also a.b."""
    tree = ast.parse(file.read_text())
    here = module_of(file).split(".")
    package = here if file.name == "__init__.py" else here[:-1]
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def libraries(file, top_level_only=False):
    return {name.split(".")[0] for name in imports(file, top_level_only)}


def modules_imported(file, top_level_only=False):
    return {name for name in imports(file, top_level_only) if name in MODULES}


def room_of(module):
    """`data` of ssl_xcit.data.order; of what lies in no room its own name."""
    parts = module.split(".")
    depth = 3 if parts[:2] == ["ssl_xcit", "eval"] else 2
    room = ".".join(parts[:depth])
    if room.startswith(EVAL):
        return room if room in ALLOWED else EVAL
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "top"


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_know_only_their_neighbours(room):
    members = [module for module in MODULES if room_of(module) == room]
    assert members
    below = set() if room == "utils" else {"utils"}
    ours = {"data", "models", "objectives", "training", "export", "sweeps", "transfer"}
    known = ALLOWED[room] | {room, "top"} | below | (ours if room.startswith(EVAL) else set())
    for module in members:
        for name in modules_imported(MODULES[module]) - {f"{EVAL}.statistics"}:
            assert room_of(name) in known, f"{module} imports {name}"
            if room_of(name) == "top":
                assert name in ("ssl_xcit", "ssl_xcit.errors"), f"{module} imports {name}"


def test_nothing_imports_from_a_command():
    for module, file in MODULES.items():
        for name in modules_imported(file):
            if room_of(name) in ("commands", f"{EVAL}.commands"):
                assert name in ("ssl_xcit.commands", f"{EVAL}.commands"), f"{module}: {name}"


def test_there_are_no_circles():
    graph = {
        module: modules_imported(file, top_level_only=True) - {module}
        for module, file in MODULES.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)


def test_data_models_and_objectives_know_no_lightning_and_no_hydra():
    for room in ("data", "models", "objectives"):
        for file in files(f"ssl_xcit/{room}"):
            assert not libraries(file) & {"lightning", "hydra", "omegaconf"}, file


def test_the_package_never_imports_eval_conf_wandb_or_faiss():
    for file in files("ssl_xcit"):
        ask = {"faiss"} if file.name == "probes.py" else set()  # whether it works
        assert not libraries(file) & {"eval", "conf", "wandb", "faiss"} - ask, file
        ours = {".".join(name.split(".")[:2]) for name in imports(file)}
        assert not ours & {EVAL, "ssl_xcit.conf"}, file


def test_faiss_is_only_where_it_searches_and_clusters():
    users = [f.name for f in files("eval") if "faiss" in libraries(f)]
    assert users == ["clustering.py", "neighbors.py"]
    assert not [f for f in files("eval") if "wandb" in libraries(f)]


def test_libraries_of_other_tools_are_imported_where_they_are_used():
    """A network can be exported to one of them without the others."""
    optional = {"onnx", "onnxruntime", "onnxscript", "timm", "transformers", "huggingface_hub"}
    optional |= {"faster_coco_eval", "pycocotools", "fsspec", "aiohttp"}
    for file in files("ssl_xcit"):
        assert not libraries(file, top_level_only=True) & optional, file


NO_CHECKOUT = """
import importlib.util as u, ssl_xcit.eval, ssl_xcit.conf
assert not u.find_spec('ssl_xcit.tests') and not u.find_spec('ssl_xcit.ssl_xcit')
"""
LIGHT_SWEEPS = """
import sys, ssl_xcit.commands.multirun
heavy = {'torch', 'lightning', 'cv2', 'sqlalchemy', 'submitit'} & set(sys.modules)
assert not heavy, heavy
"""
LIGHT_HELP = """
import sys, ssl_xcit, ssl_xcit.cli as c; c.main(['--help'])
try: c.main(['pretrain', '--help'])
except SystemExit: pass
heavy = {'torch', 'lightning', 'faiss', 'wandb', 'torchvision', 'cv2'} & set(sys.modules)
assert not heavy, heavy
"""
LIGHT_DOCTOR = """
import sys, ssl_xcit.commands.doctor
heavy = {'torch', 'lightning', 'faiss', 'cv2', 'PIL', 'numpy', 'wandb'} & set(sys.modules)
assert not heavy, heavy
"""
LIGHT_RUNS = """
import sys, ssl_xcit.cli as c
for words in (['pretrain', 'data.root=none'], ['eval', 'ckpt=none']):
    try: c.main(words)
    except SystemExit as end: assert end.code == 2, end.code
assert 'lightning' in sys.modules
heavy = {'transformers', 'matplotlib', 'sklearn', 'pandas', 'wandb', 'tensorboard', 'timm', 'onnx',
         'datasets', 'huggingface_hub', 'plotly', 'optuna', 'openTSNE', 'skimage.io', 'av',
         'IPython', 'scipy.stats', 'scipy.signal'} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "code",
    [NO_CHECKOUT, LIGHT_SWEEPS, LIGHT_HELP, LIGHT_DOCTOR, LIGHT_RUNS],
    ids=["no checkout", "sweeps", "help", "doctor", "runs"],
)
def test_what_is_imported(code):
    """The checkout is no part of the package; what drives a sweep and asking for help are
    light; runs import no library that only others of their kind need."""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_the_version_is_one():
    """Of the package and of its citation; the build reads the first."""
    cited = next(
        line for line in (ROOT / "CITATION.cff").read_text().splitlines() if "version:" in line[:9]
    )
    assert cited == f"version: {ssl_xcit.__version__}"
