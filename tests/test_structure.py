"""Who may import whom (docs/decisions.md), and what importing must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {  # room -> rooms of ssl_xcit that it may know
    "data": {"data"},
    "models": {"models"},
    "objectives": {"objectives"},
    "training": {"training", "objectives", "models", "data"},
    "export": {"export", "models", "data", "run_folder", "table"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_know_only_their_neighbours(room):
    for file in files(f"ssl_xcit/{room}"):
        for name in imports(file):
            if name.startswith("ssl_xcit."):
                known = ALLOWED[room] | {"cores", "errors", "files", "locks", "terminal"}
                assert name.split(".")[1] in known, f"{file}: {name}"


def test_the_package_never_imports_eval_conf_wandb_or_faiss():
    for file in files("ssl_xcit"):
        for name in imports(file):
            top = name.split(".")
            assert top[0] not in ("eval", "conf", "wandb", "faiss"), f"{file}: {name}"
            assert top[:2] not in (["ssl_xcit", "eval"], ["ssl_xcit", "conf"]), f"{file}: {name}"


def test_what_drives_a_sweep_is_light():
    code = (
        "import sys, ssl_xcit.sweeps.command, ssl_xcit.sweeps.launchers, ssl_xcit.sweeps.tpe\n"
        "heavy = {'torch', 'lightning', 'cv2', 'optuna', 'submitit'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_faiss_is_only_where_it_searches_and_clusters():
    users = [f.name for f in files("eval") if "faiss" in imports(f)]
    assert users == ["clustering.py", "search.py"]
    assert not [f for f in files("eval") if "wandb" in imports(f)]


def test_numbers_know_no_pictures_and_pictures_no_report():
    def rooms(file):
        """Below eval/, that a file imports from."""
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                here = file.relative_to(ROOT / "eval").parent.parts
                base = here[: len(here) - node.level + 1]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                yield from ((*base, *name.split("."))[0] for name in names)

    for file in files("eval"):
        room = file.relative_to(ROOT / "eval").parts[0]
        known = {"report": set(), "views": {"report"}}.get(room, {"views", "report"})
        assert not known & set(rooms(file)), file


def test_libraries_of_other_tools_are_imported_where_they_are_used():
    """A network can be exported to one of them without the others."""
    optional = {"onnx", "onnxruntime", "onnxscript", "timm", "transformers", "huggingface_hub"}
    for file in files("ssl_xcit"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names.append(getattr(node, "module", None) or "")
                assert not optional & {name.split(".")[0] for name in names}, file


def test_importing_the_package_and_asking_for_help_is_light():
    code = (
        "import sys, ssl_xcit, ssl_xcit.cli as c; c.main(['--help'])\n"
        "try: c.main(['pretrain', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'faiss', 'wandb', 'torchvision', 'cv2'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
