"""Every format in the tool that it is made for, against the backbone itself."""

import hashlib
import json
import math
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from commands import images, run
from PIL import Image
from safetensors.torch import load_file
from tiny_run import make_run, published, sharp_backbone

from ssl_xcit import create_model, load_backbone
from ssl_xcit.data.preprocess import Preprocess, normalise, resize_center_crop
from ssl_xcit.errors import RunFailed
from ssl_xcit.export import command
from ssl_xcit.export.exported import Weights, beside, compare
from ssl_xcit.export.huggingface import crop_share
from ssl_xcit.export.rounded import cost
from ssl_xcit.export.weights_files import timm_arguments
from ssl_xcit.models.names import to_timm_names
from ssl_xcit.models.xca import gram_is_faster
from ssl_xcit.models.xcit import SIZES, XCiT

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
    weights = (run_dir / "checkpoints/step-000006.ckpt").read_bytes()
    assert about["sha256"] == hashlib.sha256(weights).hexdigest()
    assert about["architecture"] == ours.architecture
    assert about["preprocess"]["mean"] == [0.485, 0.456, 0.406]
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


def test_timms_name_is_of_the_whole_architecture():
    """The nano size with norms over all tokens is not timm's nano."""
    for name, (dim, depth, heads, eta, tokens_norm) in SIZES.items():
        with torch.device("meta"):
            here = [
                XCiT(dim, depth, heads, 16, eta, norm) for norm in (tokens_norm, not tokens_norm)
            ]
        same, other = (timm_arguments(Weights(backbone, "x", {})) for backbone in here)
        assert same == (f"xcit_{name}_p16_224", {"num_classes": 0})
        assert other[1]["tokens_norm"] is not tokens_norm
    torch.manual_seed(0)
    backbone = XCiT(128, 12, 4, 16, 1.0, tokens_norm=True).eval()
    with torch.no_grad():
        for block in backbone.cls_attn_blocks:
            block.norm2.weight.normal_()
    name, arguments = timm_arguments(Weights(backbone, "x", {}))
    model = timm.create_model(name, **arguments).eval()
    model.load_state_dict(to_timm_names(backbone.state_dict()))
    assert_same(backbone, model)


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
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    size = config["input_size"][-1]
    resize = round(size / config["crop_pct"])
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize((400, 300)))
    theirs = AutoImageProcessor.from_pretrained(folder)(Image.fromarray(pixels))["pixel_values"][0]
    mine = torch.from_numpy(resize_center_crop(pixels, resize, size).transpose(2, 0, 1).copy())
    mine = normalise(mine, Weights(ours, "", {}).how)
    assert (theirs - mine).abs().max() < 0.03  # a grey level or two of rounding


def test_crops_are_as_large_as_evaluations():
    """timm rounds down what it divides."""
    for size in range(16, 400, 4):
        for resize in range(size, 2 * size):
            assert math.floor(size / crop_share(resize, size)) == resize


def neighbours_agree(network, train, test, k=20, temperature=0.07):
    """k-NN in percent, as the protocol reads."""

    def features(files):
        pixels = [resize_center_crop(np.asarray(Image.open(f)), 48, 32) for f in files]
        x = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            return torch.nn.functional.normalize(network(normalise(x, Preprocess())), dim=-1)

    labels = [torch.tensor([f.parent.name == "b" for f in files]).long() for files in (train, test)]
    similarity, near = (features(test) @ features(train).T).topk(k)
    votes = torch.zeros(len(test), 2)
    votes.scatter_add_(1, labels[0][near], (similarity / temperature).exp())
    return 100.0 * (votes.argmax(dim=1) == labels[1]).double().mean().item()


def test_programs_and_rounded_weights(tmp_path, capsys):
    """In one command, for exporters are slow: ONNX, torch.export's and int8 with patches, bfloat16;
    at any size, with k-NN on labelled images beside the float32 one.
    """
    backbone = sharp_backbone(patch_size=4)
    del backbone.blocks[1]
    torch.save(backbone.state_dict(), "w.0.pth")
    for part, count in (("train", 15), ("test", 11)):
        for label in "ab":
            images(Path(part) / label, count + (label == "b"))
    words = ["eval_data=folder", "eval_data.root=train", "eval_data.test_root=test", "out=here/"]
    words += ["eval_data.resize=48", "eval_data.size=32"]
    words += [f"formats.{name}.patches=true" for name in ("onnx", "program", "int8")]
    assert run("export", "ckpt=w.0.pth", "format=[onnx,program,int8,bf16]", *words) == 0
    captured = capsys.readouterr()
    assert not captured.err
    assert sorted(p.name for p in Path("here").iterdir()) == [
        "w.0-bf16.json", "w.0-bf16.safetensors", "w.0-int8.json", "w.0-int8.onnx", "w.0.onnx",
        "w.0.pt2",
    ]  # fmt: skip
    check_programs(load_backbone("w.0.pth"), captured.out)
    check_rounded(load_backbone("w.0.pth"), captured.out)


def check_programs(ours, out):
    assert "opset 20" in out
    assert "height and width from 5 pixels" in out
    assert out.count("largest difference of a class or patch feature") == 2
    session = onnxruntime.InferenceSession("here/w.0.onnx")
    low = onnxruntime.InferenceSession("here/w.0-int8.onnx")
    program = torch.export.load("here/w.0.pt2").module()
    # ONNX also of images as small as a patch and smaller
    for shape in (*SHAPES, (1, 3, 5, 5), (1, 3, 4, 8), (1, 3, 1, 1)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = ours.forward_features(x)
            found = [[torch.from_numpy(t) for t in session.run(None, {"images": x.numpy()})]]
            if min(shape[2:]) >= 5:
                found.append(program(x))
        for theirs in found:
            for one, other in zip(expected, theirs, strict=True):
                assert (one - other).abs().max() < 1e-5 * one.abs().max(), shape
        rounded = [torch.from_numpy(t) for t in low.run(None, {"images": x.numpy()})]
        for one, other in zip(expected, rounded, strict=True):
            # a network made sharp on purpose
            assert torch.cosine_similarity(one, other).min() > 0.8, shape
    model = onnx.load("here/w.0.onnx")
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, "height", "width"]
    assert model.opset_import[0].version == 20
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (about["mean"], about["size"], about["resize"]) == ([0.485, 0.456, 0.406], 32, 48)
    assert about["architecture"] == ours.architecture
    kinds = {node.op_type for node in onnx.load("here/w.0-int8.onnx").graph.node}
    assert "MatMulInteger" in kinds


def check_rounded(ours, out):
    low = load_backbone("here/w.0-bf16.safetensors")
    assert_same(ours, low, bound=0.05)
    assert {v.dtype for v in load_file("here/w.0-bf16.safetensors").values()} == {
        torch.bfloat16, torch.int64,
    }  # fmt: skip
    session = onnxruntime.InferenceSession("here/w.0-int8.onnx")

    def int8(x):
        return torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])

    files = [sorted(Path(part).rglob("*.png")) for part in ("train", "test")]
    for name, network in (("int8", int8), ("bf16", low)):
        about = json.loads(Path(f"here/w.0-{name}.json").read_text())
        found = about[name]["knn_k20"]
        assert found["float32"] == pytest.approx(neighbours_agree(ours, *files))
        assert found[name] == pytest.approx(neighbours_agree(network, *files), abs=100 / 24 + 1e-6)
        told = f"float32 {found['float32']:.1f}, {name} {found[name]:.1f}, a difference of "
        assert f"{told}{found[name] - found['float32']:+.1f}" in out
        assert 0.2 < about[name]["size_of_float32"] < 0.9
        assert f"{about[name]['times_as_fast']:.2f} times as fast" in out


def test_images_of_other_channels_are_read_as_the_weights_want(capsys):
    torch.manual_seed(0)
    backbone = XCiT(32, 1, 2, patch_size=8, in_chans=5).eval()
    how = {"channels": 5, "mean": [0.5] * 5, "std": [0.3] * 5, "value_range": [0, 10_000]}
    state = {f"teacher.backbone.{k}": v for k, v in backbone.state_dict().items()}
    content = {"state_dict": state, "architecture": backbone.architecture, "preprocess": how}
    torch.save(content, "w.ckpt")
    rng = np.random.default_rng(0)
    for label in "ab":
        Path("bands", label).mkdir(parents=True)
        for i in range(30):
            np.save(f"bands/{label}/{i}.npy", rng.integers(0, 10_000, (32, 32, 5), np.uint16))
    words = ["eval_data=folder", "eval_data.root=bands", "eval_data.resize=32", "eval_data.size=32"]
    assert run("export", "ckpt=w.ckpt", "format=[timm,bf16]", *words) == 0
    out = capsys.readouterr().out
    assert "num_classes=0, in_chans=5" in out
    assert "k-NN 20 in %: float32 " in out
    assert json.loads(Path("export/w-bf16.json").read_text())["preprocess"]["channels"] == 5


def test_numbers_are_of_the_very_weights(run_dir):
    """Neither the student nor an earlier checkpoint has the final numbers, or the final name."""
    first = "ckpt=lr-0.001/checkpoints/step-000003.ckpt"
    assert run("export", first, "format=safetensors") == 0
    assert run("export", "ckpt=lr-0.001", "format=huggingface", "which=student") == 0
    assert run("export", "ckpt=lr-0.001", "format=huggingface") == 0
    place = run_dir / "export"
    about = json.loads((place / "lr-0.001-step-000003.json").read_text())
    assert (about["results"], about["steps"]) == ({}, 3)
    cards = [
        (place / f"lr-0.001{end}-huggingface/README.md").read_text() for end in ("-student", "")
    ]
    assert ["It was not measured" in card for card in cards] == [True, False]
    student = load_backbone(run_dir, which="student")
    assert_same(student, load_backbone(place / "lr-0.001-student-huggingface"), bound=0)
    # measured by `ssl-xcit eval`
    digest = hashlib.sha256((run_dir / "checkpoints/step-000003.ckpt").read_bytes()).hexdigest()
    results = {"pretrained": {"knn_k20": 40.0}}
    content = {"weights_sha256": digest, "which": "teacher", "results": results, "data": "/a/b c"}
    (run_dir / "results.json").write_text(json.dumps(content))
    assert run("export", first, "format=safetensors") == 0
    about = json.loads((place / "lr-0.001-step-000003.json").read_text())
    assert (about["results"], about["data"]) == (results, "b c")


def test_what_is_given_away_names_no_folders():
    assert command.last_parts("data.root=/home/me/photos") == "data.root=photos"
    assert command.last_parts("data.root=[/a/b,~/c/d.txt]") == "data.root=[b,d.txt]"
    assert command.last_parts("built-in photos") == "built-in photos"


def test_a_run_folder_is_also_here(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir)
    assert run("export", "ckpt=.", "format=safetensors") == 0
    assert Path("export/lr-0.001.safetensors").is_file()
    assert run("export", "ckpt=.", "format=huggingface", "out=card") == 0
    assert run("export", "ckpt=card-huggingface", "format=safetensors") == 0
    assert Path("card-huggingface/export/card-huggingface.safetensors").is_file()
    assert run("export", "ckpt=.", "format=huggingface", "out=card") == 2  # others' files are in it


def test_what_differs_is_not_exported(tmp_path):
    weights = Weights(sharp_backbone(), "x", {})
    with pytest.raises(RunFailed, match="features differ by"):
        compare(weights, sharp_backbone(1))
    with pytest.raises(RunFailed, match="not finite: nothing is exported"):
        compare(weights, lambda x: weights.backbone(x) * float("nan"))
    with pytest.raises(RunFailed, match="came out"):
        compare(weights, lambda x: weights.backbone(x)[:, :5])
    with pytest.raises(RunFailed, match="do not bear the rounding"):
        cost(weights, "int8", (weights.backbone, lambda x: -weights.backbone(x)), (2, 1), None)

    def doubled(x):
        cls, patches = weights.backbone.forward_features(x)
        return cls, 2 * patches

    with pytest.raises(RunFailed, match="features differ by"):
        compare(weights, doubled, patches=True)

    def half():
        with beside(tmp_path / "x.onnx") as part:
            part.write_text("half")
            raise RunFailed("")

    with pytest.raises(RunFailed):
        half()
    assert not list(tmp_path.iterdir())


def test_weights_that_diverged(capsys):
    backbone = sharp_backbone()
    torch.nn.init.constant_(backbone.norm.weight, float("nan"))
    torch.save(backbone.state_dict(), "w.pth")
    assert run("export", "ckpt=w.pth", "format=[safetensors,timm]") == 2
    assert "not finite: take an earlier checkpoint" in capsys.readouterr().out
    assert not list(Path("export").iterdir())


def test_a_broken_off_export_leaves_what_was_there(run_dir, monkeypatch):
    words = ["export", "ckpt=lr-0.001", "format=[huggingface,safetensors]"]
    assert run(*words) == 0
    before = {p: p.read_bytes() for p in (run_dir / "export").rglob("*") if p.is_file()}
    for trouble, code in ((RunFailed("x"), 1), (KeyboardInterrupt(), 130)):

        def fail(*_, trouble=trouble):
            raise trouble

        monkeypatch.setattr("ssl_xcit.export.exported.real_images", fail)
        assert run(*words) == code
        after = {p: p.read_bytes() for p in (run_dir / "export").rglob("*") if p.is_file()}
        assert after == before


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
    assert run("export", "ckpt=w.pth", "format=bf16") == 0
    assert "k-NN was not measured: there are no labelled images" in capsys.readouterr().out


def test_push_only_when_asked(run_dir, monkeypatch, capsys):
    sent = []

    class Hub:
        def __init__(self):  # the token is its own affair
            pass

        def create_repo(self, repo, private, exist_ok):
            sent.append((repo, private))

        def upload_folder(self, repo_id, folder_path):
            sent.append(sorted(p.name for p in Path(folder_path).iterdir()))
            return f"https://hub/{repo_id}"

    words = ["export", "ckpt=lr-0.001", "format=huggingface"]
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert run(*words) == 0
    assert not sent
    assert run(*words, "formats.huggingface.push=me/net") == 0
    assert "pushed: https://hub/me/net" in capsys.readouterr().out
    assert sent == [("me/net", True), ["README.md", "config.json", "model.safetensors"]]
    card = (run_dir / "export/lr-0.001-huggingface/README.md").read_text()
    assert 'from_pretrained("me/net")' in card
    assert run(*words, "formats.huggingface.push=me/net", "formats.huggingface.private=false") == 0
    assert sent[2] == ("me/net", False)


def test_push_without_network(run_dir, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    words = ["export", "ckpt=lr-0.001", "format=huggingface", "formats.huggingface.push=me/net"]
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert "push=me/net: " in error
    assert "`hf upload me/net" in error
    assert error.count("\n") == 1
    assert (run_dir / "export/lr-0.001-huggingface/model.safetensors").is_file()


def test_exported_programs_agree_with_float64_where_the_backbone_takes_the_gram_form():
    backbone = sharp_backbone()
    x = torch.randn(2, 3, 160, 160)
    assert gram_is_faster(400, 32, False, False, x.device)
    program = torch.export.export(backbone, (x,)).module()
    exact = sharp_backbone().double()
    with torch.no_grad():
        truth = exact(x.double())
        for network in (backbone, program):
            assert (network(x) - truth).abs().max() < 1e-5 * truth.abs().max()
