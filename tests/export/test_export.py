"""Every format in the tool that it is made for, against the backbone itself."""

import json
import sys
import types
from pathlib import Path

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from commands import run
from safetensors.torch import load_file
from tiny_run import make_run, published, sharp_backbone

from ssl_xcit import create_model, load_backbone
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export import huggingface
from ssl_xcit.export.exported import Weights, beside, compare
from ssl_xcit.models.xcit import XCiT

SHAPES = [(1, 3, 32, 32), (3, 3, 75, 52), (2, 3, 128, 224)]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    jaxtyping.config.update("jaxtyping_disable", True)  # exporters trace with symbols for numbers
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def run_dir(tmp_path):
    folder = make_run(tmp_path / "lr-0.001")
    values = {"knn_k20": 81.0, "linear": 85.5, "linear_lr": 1.0}
    summary = {
        "results": {"random weights": {"knn_k20": 70.0}, "pretrained": values},
        "intervals": {"pretrained": {"knn_k20": [78.0, 84.0]}},
        "data": "built-in photos",
        "last": {"step": 6, "epoch": 1.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def inputs(channels=3):
    torch.manual_seed(3)
    return [torch.randn(n, channels, h, w) for n, _, h, w in SHAPES]


def assert_same(backbone, other, bound=1e-5):
    with torch.no_grad():
        for x in inputs(backbone.architecture["in_chans"]):
            ours = backbone(x)
            assert (torch.as_tensor(other(x)) - ours).abs().max() <= bound * ours.abs().max(), (
                x.shape
            )


def executed(lines):
    """What the command says to type."""
    scope = {}
    exec("\n".join(lines), scope)  # noqa: S102
    return scope


def told(out):
    return [line[4:] for line in out.splitlines() if line.startswith("    ")]


def test_safetensors_and_back(run_dir, capsys):
    assert run("export", "ckpt=lr-0.001", "format=safetensors") == 0
    out = capsys.readouterr().out
    assert "largest difference of a feature 0.0e+00" in out
    file = run_dir / "export/lr-0.001.safetensors"
    ours = load_backbone(run_dir)
    assert load_file(file).keys() == ours.state_dict().keys()
    back = executed(told(out))["backbone"]
    assert_same(ours, back, bound=0)
    assert back.architecture == ours.architecture
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["results"]["pretrained"]["linear"] == 85.5
    assert len(about["sha256"]) == 64
    assert file.stat().st_mode == file.with_suffix(".json").stat().st_mode
    assert sorted(p.name for p in file.parent.iterdir()) == [
        "lr-0.001.json", "lr-0.001.safetensors",
    ]  # fmt: skip


def test_timm_and_back(run_dir, capsys):
    assert run("export", "ckpt=lr-0.001", "format=timm") == 0
    model = executed(told(capsys.readouterr().out))["model"].eval()
    ours = load_backbone(run_dir)
    assert_same(ours, model)
    back = load_backbone(run_dir / "export/lr-0.001-timm.safetensors")
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in back.state_dict().items())


def test_a_published_size_has_timms_name(tmp_path, capsys):
    torch.manual_seed(0)
    model = create_model("xcit_nano_12_p8", in_chans=2, num_classes=7).eval()
    model.preprocess = {"channels": 2, "mean": [0.1, 0.2], "std": [1.0, 2.0]}
    torch.save(
        {"state_dict": {f"teacher.backbone.{k}": v for k, v in model.state_dict().items()},
         "architecture": model.architecture, "preprocess": model.preprocess},
        "nano.ckpt",
    )  # fmt: skip
    assert run("export", "ckpt=nano.ckpt", "format=timm") == 0
    out = capsys.readouterr().out
    assert 'create_model("xcit_nano_12_p8_224", num_classes=0, in_chans=2, checkpoint_path=' in out
    assert "its classifier is left out" in out
    other = timm.create_model(
        "xcit_nano_12_p8_224", num_classes=0, in_chans=2,
        checkpoint_path="export/nano-timm.safetensors",
    )  # fmt: skip
    assert_same(model, other.eval())


def test_huggingface_by_transformers_timm_and_us(run_dir, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("export", "ckpt=lr-0.001", "format=huggingface") == 0
    out = capsys.readouterr().out
    folder = run_dir / "export/lr-0.001-huggingface"
    from transformers import AutoImageProcessor, AutoModel

    ours = load_backbone(run_dir)
    model = AutoModel.from_pretrained(folder).eval()
    assert_same(ours, lambda x: model(pixel_values=x).pooler_output)
    assert_same(ours, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    assert_same(ours, load_backbone(folder), bound=0)
    scope = executed([*told(out)[:2], "import torch"])
    assert type(scope["model"]).__name__ == "TimmWrapperModel"
    card = (folder / "README.md").read_text()
    assert "| k-NN 20 | 81.0 | 78.0–84.0 |" in card
    assert "linear_lr" not in card
    # AutoImageProcessor prepares an image as evaluation does
    from PIL import Image

    from ssl_xcit.data.preprocess import normalise, resize_center_crop

    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    size = config["input_size"][-1]
    resize = round(size / config["crop_pct"])
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize((400, 300)))
    theirs = AutoImageProcessor.from_pretrained(folder)(Image.fromarray(pixels))["pixel_values"][0]
    mine = torch.from_numpy(resize_center_crop(pixels, resize, size).transpose(2, 0, 1).copy())
    mine = normalise(mine, Weights(ours, "", {}).how)
    assert (theirs - mine).abs().max() < 0.03  # a grey level or two of rounding


def test_onnx_at_any_size(run_dir, capsys):
    words = ["ckpt=lr-0.001", "format=onnx", "formats.onnx.patches=true", "out=here/net"]
    assert run("export", *words) == 0
    assert "opset 20" in capsys.readouterr().out
    session = onnxruntime.InferenceSession("here/net.onnx")
    ours = load_backbone(run_dir)
    for x in inputs():
        features, patches = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            found = ours.forward_features(x)
        assert np.abs(features - found.cls.numpy()).max() < 1e-5 * found.cls.abs().max()
        assert np.abs(patches - found.patches.numpy()).max() < 1e-5 * found.patches.abs().max()
    model = onnx.load("here/net.onnx")
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, "height", "width"]
    told_ = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert told_["mean"] == [0.485, 0.456, 0.406]


def test_program_and_int8_and_bf16(run_dir, capsys):
    """In one command; k-NN on labelled images beside the float32 one."""
    words = ["eval_data=photos", "out=low/"]
    assert run("export", "ckpt=lr-0.001", "format=[program,int8,bf16]", *words) == 0
    out = capsys.readouterr().out
    ours = load_backbone(run_dir)
    program = torch.export.load("low/lr-0.001.pt2").module()
    assert_same(ours, program)
    low = load_backbone("low/lr-0.001-bf16.safetensors")
    assert_same(ours, low, bound=0.05)
    session = onnxruntime.InferenceSession("low/lr-0.001-int8.onnx")
    kinds = {node.op_type for node in onnx.load("low/lr-0.001-int8.onnx").graph.node}
    assert "MatMulInteger" in kinds
    with torch.no_grad():
        for x in inputs():
            (features,) = session.run(None, {"images": x.numpy()})
            cosine = torch.cosine_similarity(torch.from_numpy(features), ours(x))
            assert cosine.min() > 0.8  # a network made sharp on purpose
    lines = [line for line in out.splitlines() if "k-NN 20 in %" in line]
    assert [line.split()[4] for line in lines] == ["float32", "float32"]
    assert sorted(p.name for p in Path("low").iterdir()) == [
        "lr-0.001-bf16.safetensors", "lr-0.001-int8.onnx", "lr-0.001.pt2",
    ]  # fmt: skip


def test_what_differs_is_not_exported(tmp_path):
    weights = Weights(sharp_backbone(), "x", {})
    with pytest.raises(RunFailed, match="features differ by"):
        compare(weights, sharp_backbone(1))

    def half():
        with beside(tmp_path / "x.onnx") as part:
            part.write_text("half")
            raise RunFailed("")

    with pytest.raises(RunFailed):
        half()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=tflite"], "format=tflite: one of safetensors, timm, huggingface, onnx"),
        (["format=[]"], "one or several of"),
        ([], "format is needed"),
        (["format=onnx", "out=x.onnx"], "without ending"),
        (["format=onnx", "which=both"], "teacher or student"),
        (["format=huggingface", "formats.huggingface.push=name"], "USER/NAME"),
    ],
)
def test_bad_words(words, message, run_dir, capsys):
    assert run("export", "ckpt=lr-0.001", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "module", "extra"),
    [
        ("onnx", "onnxscript", "onnx"), ("int8", "onnxruntime", "onnx"), ("timm", "timm", "timm"),
        ("huggingface", "transformers", "transformers"),
    ],
)  # fmt: skip
def test_a_missing_library(word, module, extra, run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert run("export", "ckpt=lr-0.001", f"format={word}") == 2
    assert f"pip install 'ssl-xcit[{extra}]'" in capsys.readouterr().err
    assert not list((run_dir / "export").glob("*"))


def test_what_a_format_cannot_hold(tmp_path, capsys):
    torch.save(XCiT(32, 1, 2, patch_size=4).state_dict(), "p4.pth")
    assert run("export", "ckpt=p4.pth", "format=timm") == 2
    assert "timm's XCiT has patches of 8 and 16" in capsys.readouterr().err
    assert run("export", "ckpt=p4.pth", "format=[timm,safetensors]") == 2
    captured = capsys.readouterr()
    assert "timm: not exported: timm's XCiT" in captured.out
    assert "1 of 2 formats were not exported" in captured.err
    assert Path("export/p4.safetensors").is_file()
    published(tmp_path / "w.pth")
    assert run("export", "ckpt=w.pth", "format=int8") == 0
    assert "k-NN was not measured" in capsys.readouterr().out


def test_push_only_when_asked(run_dir, monkeypatch, capsys):
    sent = []

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            sent.append((repo, private))

        def upload_folder(self, repo_id, folder_path):
            sent.append(sorted(p.name for p in Path(folder_path).iterdir()))
            return f"https://hub/{repo_id}"

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Hub))
    assert huggingface.upload(run_dir, "me/net", True) == "https://hub/me/net"
    assert sent[0] == ("me/net", True)
    monkeypatch.undo()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(RunFailed, match=r"push=me/net: .*hf upload me/net"):
        huggingface.upload(run_dir, "me/net", True)
    with pytest.raises(UserError):
        huggingface.huggingface(Weights(sharp_backbone(), "x", {}), Path("x"), push="../x")


def test_three_numbers_of_backbone_forms_agree_with_float64():
    """What exporters run, the direct form, is the same function as what the backbone chooses."""
    backbone = sharp_backbone()
    x = torch.randn(2, 3, 160, 160)  # enough tokens for the Gram form
    program = torch.export.export(backbone, (x,)).module()
    exact = sharp_backbone().double()
    with torch.no_grad():
        truth = exact(x.double())
        for network in (backbone, program):
            assert (network(x) - truth).abs().max() < 1e-5 * truth.abs().max()
