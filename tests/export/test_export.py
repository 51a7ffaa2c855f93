"""Every format in the tool that it is made for, against the backbone itself."""

import contextlib
import hashlib
import io
import json
import math
import sys
from pathlib import Path
from unittest import mock

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from brute_force import cosines, exact_neighbours
from commands import images, run, same
from PIL import Image
from safetensors.torch import load_file
from tiny_run import make_run, sharp_backbone

from ssl_xcit import create_model, load_backbone
from ssl_xcit.data.preprocess import Preprocess, normalise, resize_center_crop
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export import huggingface, programs, safetensors_files
from ssl_xcit.export.comparison import compare, compare_rounded
from ssl_xcit.export.description import Weights, describe, export_name, last_parts
from ssl_xcit.export.output_files import output_path, replacing_path
from ssl_xcit.export.safetensors_files import timm_arguments
from ssl_xcit.models.checkpoint_files import checkpoint_path
from ssl_xcit.models.xca import gram_is_faster
from ssl_xcit.models.xcit import SIZES, XCiT

SHAPES = [(1, 3, 32, 32), (3, 3, 75, 52), (2, 3, 128, 224)]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def shapes_of_symbols():
    """Exporters trace with symbols for numbers, which jaxtyping would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "lr-0.001")
    values = {"knn_k20": 81.0, "linear": 85.5, "linear_lr": 1.0}
    summary = {
        "results": {"random weights": {"knn_k20": 70.0}, "pretrained": values},
        "intervals": {"pretrained": {"knn_k20": [78.0, 84.0]}},
        "data": "built-in photos",
        "last": {"step": 6, "epoch": 1.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def backbone(run_dir):
    return load_backbone(run_dir)


@pytest.fixture
def weights(run_dir, backbone):
    about = describe("teacher", checkpoint_path(run_dir), run_dir, "XCiT")
    return Weights(backbone, "lr-0.001", about)


@pytest.fixture(scope="module")
def exported(run_dir, shapes_of_symbols):
    """Output of one command line with three formats, and its folder."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert run("export", f"ckpt={run_dir}", "format=[safetensors,timm,huggingface]") == 0
    return output.getvalue(), run_dir / "export"


def inputs(channels=3):
    torch.manual_seed(3)
    return [torch.randn(n, channels, h, w) for n, _, h, w in SHAPES]


def assert_same(backbone, other, bound=1e-5):
    with torch.no_grad():
        for x in inputs(backbone.architecture["in_chans"]):
            ours = backbone(x)
            difference = (torch.as_tensor(other(x)) - ours).abs().max()
            assert difference <= bound * ours.abs().max(), x.shape


def executed(output, word):
    """The variables that the lines printed for a format define."""
    section = output.partition(f"\n{word}: ")[2].partition("\n\n")[0]
    variables = {"images": inputs()[0]}
    exec("\n".join(x[4:] for x in section.splitlines() if x.startswith("    ")), variables)  # noqa: S102
    return variables


def test_safetensors_and_back(run_dir, backbone, exported):
    output, folder = exported
    assert "largest difference of a feature 0.0e+00" in output
    file = folder / "lr-0.001.safetensors"
    assert load_file(file).keys() == backbone.state_dict().keys()
    loaded = executed(output, "safetensors")["backbone"]
    assert_same(backbone, loaded, bound=0)
    assert loaded.architecture == backbone.architecture
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["results"]["pretrained"]["linear"] == 85.5
    checkpoint = (run_dir / "checkpoints/step-000006.ckpt").read_bytes()
    assert about["sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert about["architecture"] == backbone.architecture
    assert about["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    assert file.stat().st_mode == file.with_suffix(".json").stat().st_mode
    ends = ("-huggingface", "-timm.safetensors", ".json", ".safetensors")
    assert {p.name for p in folder.iterdir()} == {f"lr-0.001{end}" for end in ends}


def test_timm_and_back(backbone, exported):
    output, folder = exported
    assert_same(backbone, executed(output, "timm")["model"].eval())
    loaded = load_backbone(folder / "lr-0.001-timm.safetensors")
    assert same(loaded.state_dict(), backbone.state_dict())


def test_a_published_size_has_timms_name(tmp_path):
    torch.manual_seed(0)
    model = create_model("xcit_nano_12_p8", in_chans=2, num_classes=7).eval()
    model.preprocess = {"channels": 2, "mean": [0.1, 0.2], "std": [1.0, 2.0]}
    use = safetensors_files.timm(Weights(model, "nano", {}), tmp_path / "nano").use
    assert 'create_model("xcit_nano_12_p8_224", num_classes=0, in_chans=2, checkpoint_' in use
    options = {"num_classes": 0, "in_chans": 2, "checkpoint_path": "nano-timm.safetensors"}
    assert_same(model, timm.create_model("xcit_nano_12_p8_224", **options).eval())


def test_timms_name_is_of_the_whole_architecture():
    """The nano size with norms over all tokens is not timm's nano."""
    for name, (dim, depth, heads, eta, tokens_norm) in SIZES.items():
        with torch.device("meta"):
            usual, other = (
                timm_arguments(Weights(XCiT(dim, depth, heads, 16, eta, norm), "x", {}))
                for norm in (tokens_norm, not tokens_norm)
            )
        assert usual == (f"xcit_{name}_p16_224", {"num_classes": 0})
        assert other[1]["tokens_norm"] is not tokens_norm


def test_huggingface_by_transformers_timm_and_us(backbone, exported, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output, folder = exported[0], exported[1] / "lr-0.001-huggingface"
    from transformers import AutoImageProcessor

    variables = executed(output, "huggingface")
    model = variables["model"]
    assert type(model).__name__ == "TimmWrapperModel"
    assert torch.equal(variables["features"], model(pixel_values=inputs()[0]).pooler_output)
    assert_same(backbone, lambda x: model(pixel_values=x).pooler_output)
    assert_same(backbone, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    assert_same(backbone, load_backbone(folder), bound=0)
    card = (folder / "README.md").read_text()
    assert "| k-NN 20 | 81.0 | 78.0–84.0 |" in card
    assert "linear_lr" not in card
    # AutoImageProcessor prepares an image as evaluation does
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    size = config["input_size"][-1]
    resize = round(size / config["crop_pct"])
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    image = Image.fromarray(noise).resize((400, 300))
    theirs = AutoImageProcessor.from_pretrained(folder)(image)["pixel_values"][0]
    cropped = resize_center_crop(np.asarray(image), resize, size)
    ours = normalise(torch.tensor(cropped).movedim(-1, 0), Weights(backbone, "", {}).preprocess)
    assert (theirs - ours).abs().max() < 0.03  # a grey level or two of rounding


def test_crops_are_as_large_as_evaluations():
    """timm rounds down what it divides."""
    for size in range(16, 400, 4):
        for resize in range(size, 2 * size):
            assert math.floor(size / huggingface.crop_share(resize, size)) == resize


def knn_accuracy(network, train, test):
    """k-NN in percent, as the protocol reads."""

    def features(files):
        pixels = [resize_center_crop(np.asarray(Image.open(f)), 48, 32) for f in files]
        x = torch.tensor(np.stack(pixels)).movedim(-1, 1).contiguous()
        with torch.no_grad():
            return network(normalise(x, Preprocess())).numpy()

    bank, labels, right = features(train), np.array([f.parent.name == "b" for f in train]), 0
    for file, query in zip(test, features(test), strict=True):
        near = exact_neighbours(bank, query, 20)
        votes = np.bincount(labels[near], np.exp(cosines(bank, query)[near] / 0.07), 2)
        right += votes.argmax() == (file.parent.name == "b")
    return 100.0 * right / len(test)


@pytest.mark.slow
def test_programs_and_rounded_weights(tmp_path, capsys):
    """In one command, for exporters are slow; with k-NN on labelled images."""
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
    ends = ("-bf16.json", "-bf16.safetensors", "-int8.json", "-int8.onnx", ".onnx", ".pt2")
    assert {p.name for p in Path("here").iterdir()} == {f"w.0{end}" for end in ends}
    check_programs(load_backbone("w.0.pth"), captured.out)
    check_rounded(load_backbone("w.0.pth"), captured.out)


def onnx_outputs(session, x):
    return [torch.from_numpy(t) for t in session.run(None, {"images": x.numpy()})]


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
            outputs = [onnx_outputs(session, x), *([program(x)] if min(shape[2:]) >= 5 else [])]
        for theirs in outputs:
            for one, other in zip(expected, theirs, strict=True):
                assert (one - other).abs().max() < 1e-5 * one.abs().max(), shape
        for one, other in zip(expected, onnx_outputs(low, x), strict=True):  # of a sharp network
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
    dtypes = {v.dtype for v in load_file("here/w.0-bf16.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.int64}
    session = onnxruntime.InferenceSession("here/w.0-int8.onnx")
    files = [sorted(Path(part).rglob("*.png")) for part in ("train", "test")]
    for name, network in (("int8", lambda x: onnx_outputs(session, x)[0]), ("bf16", low)):
        about = json.loads(Path(f"here/w.0-{name}.json").read_text())
        scores = about[name]["knn_k20"]
        assert scores["float32"] == pytest.approx(knn_accuracy(ours, *files))
        assert scores[name] == pytest.approx(knn_accuracy(network, *files), abs=100 / 24 + 1e-6)
        words = f"float32 {scores['float32']:.1f}, {name} {scores[name]:.1f}, a difference of "
        assert f"{words}{scores[name] - scores['float32']:+.1f}" in out
        assert 0.2 < about[name]["size_of_float32"] < 0.9
        assert f"{about[name]['times_as_fast']:.2f} times as fast" in out


def test_images_of_other_channels_are_read_as_the_weights_want(capsys):
    torch.manual_seed(0)
    backbone = XCiT(32, 1, 2, patch_size=8, in_chans=5, num_classes=3).eval()
    preprocess = {"channels": 5, "mean": [0.5] * 5, "std": [0.3] * 5, "value_range": [0, 10_000]}
    state = {f"teacher.backbone.{k}": v for k, v in backbone.state_dict().items()}
    content = {"state_dict": state, "architecture": backbone.architecture, "preprocess": preprocess}
    torch.save(content, "w.ckpt")
    rng = np.random.default_rng(0)
    for label in "ab":
        Path("bands", label).mkdir(parents=True)
        for i in range(30):
            np.save(f"bands/{label}/{i}.npy", rng.integers(0, 10_000, (32, 32, 5), np.uint16))
    words = ["eval_data=folder", "eval_data.root=bands", "eval_data.resize=32", "eval_data.size=32"]
    assert run("export", "ckpt=w.ckpt", "format=[timm,bf16]", *words) == 0
    out = capsys.readouterr().out
    assert "its classifier is left out" in out
    assert "num_classes=0, in_chans=5" in out
    assert "k-NN 20 in %: float32 " in out
    assert json.loads(Path("export/w-bf16.json").read_text())["preprocess"]["channels"] == 5


def test_numbers_are_of_the_very_weights(run_dir, backbone, tmp_path):
    """Neither the student nor an earlier checkpoint has the final numbers, or the final name."""
    first, last = (run_dir / f"checkpoints/step-00000{step}.ckpt" for step in (3, 6))
    about = describe("teacher", first, run_dir, "XCiT")
    assert (about["results"], about["steps"], about["epochs"]) == ({}, 3, 1.5)
    assert export_name(first, run_dir, "teacher") == "lr-0.001-step-000003"
    for which in ("student", "teacher"):
        weights = Weights(backbone, "x", describe(which, last, run_dir, "XCiT"))
        card = huggingface.card(weights, "x", None)
        assert ("It was not measured" in card) == (which == "student")
    assert run("export", f"ckpt={run_dir}", "format=safetensors", "which=student", "out=./") == 0
    student = load_backbone(run_dir, which="student")
    assert_same(student, load_backbone("lr-0.001-student.safetensors"), bound=0)
    # measured by `ssl-xcit eval`
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    results = {"pretrained": {"knn_k20": 40.0}}
    content = {"weights_sha256": digest, "which": "teacher", "results": results, "data": "/a/b c"}
    (run_dir / "results.json").write_text(json.dumps(content))
    about = describe("teacher", first, run_dir, "XCiT")
    assert (about["results"], about["data"]) == (results, "b c")


def test_exported_files_name_no_folders():
    assert last_parts("data.root=/home/me/photos") == "data.root=photos"
    assert last_parts("data.root=[/a/b,~/c/d.txt]") == "data.root=[b,d.txt]"
    assert last_parts("built-in photos") == "built-in photos"


def test_where_files_go(run_dir, weights, tmp_path, monkeypatch):
    exported = huggingface.huggingface(weights, Path("card"))
    assert exported.paths == [Path("card-huggingface")]
    file = checkpoint_path("card-huggingface")
    name = export_name(file, None, "teacher")
    assert output_path(None, file, None, name) == Path("card-huggingface/export/card-huggingface")
    with pytest.raises(UserError, match="holds export, which this command has not written"):
        huggingface.huggingface(weights, Path("card"))
    assert output_path("deep/x.0", file, None, name) == Path("deep/x.0")
    assert output_path("deep", file, None, name) == Path("deep/card-huggingface")
    with pytest.raises(UserError, match=r"out=x\.onnx: give the path without ending"):
        output_path("x.onnx", file, None, name)
    monkeypatch.chdir(run_dir)
    path, here = checkpoint_path("."), Path(".")
    name = export_name(path, here, "teacher")
    assert output_path(None, path, here, name) == Path("export/lr-0.001")


def test_what_differs_is_not_exported(tmp_path):
    backbone = sharp_backbone()
    weights = Weights(backbone, "x", {})

    def doubled(x):
        cls, patches = backbone.forward_features(x)
        return cls, 2 * patches

    for other, message in (
        (sharp_backbone(1), "features differ by"), (doubled, "features differ by"),
        (lambda x: backbone(x) * float("nan"), "not finite: nothing is exported"),
        (lambda x: backbone(x)[:, :5], "features have the shapes"),
    ):  # fmt: skip
        expected = backbone.forward_features if other is doubled else None
        with pytest.raises(RunFailed, match=message):
            compare(weights, other, expected=expected)
    with pytest.raises(RunFailed, match=r"cosine similarity to float32 fell to -1\.00"):
        compare_rounded(weights, "int8", (backbone, lambda x: -backbone(x)), (2, 1), None)
    with pytest.raises(RunFailed), replacing_path(tmp_path / "x.onnx") as part:  # noqa: PT012
        part.write_text("half")
        raise RunFailed("")
    assert not list(tmp_path.iterdir())


def test_weights_that_diverged(capsys):
    backbone = sharp_backbone()
    torch.nn.init.constant_(backbone.norm.weight, float("nan"))
    torch.save(backbone.state_dict(), "w.pth")
    assert run("export", "ckpt=w.pth", "format=[safetensors,timm]") == 2
    assert "not finite: take an earlier checkpoint" in capsys.readouterr().out
    assert not list(Path("export").iterdir())


def test_a_broken_off_export_leaves_what_was_there(weights, tmp_path, monkeypatch):
    def written():
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    formats = (huggingface.huggingface, safetensors_files.safetensors)
    for export in formats:
        export(weights, tmp_path / "x")
    before = written()
    for trouble in (RunFailed, KeyboardInterrupt):
        fail = mock.Mock(side_effect=trouble("x"))
        monkeypatch.setattr("ssl_xcit.export.comparison.real_images", fail)
        for export in formats:
            with pytest.raises(trouble):
                export(weights, tmp_path / "x")
        assert written() == before


def test_a_format_that_is_not_known(run_dir, capsys):
    for word, message in (
        ("tflite", "format=tflite must be one of safetensors, timm, huggingface, onnx"),
        ("[]", "format=[] must be one or several of safetensors, timm"),
    ):
        assert run("export", f"ckpt={run_dir}", f"format={word}") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("export", "module", "extra"),
    [
        (programs.onnx, "onnxscript", "onnx"), (programs.int8, "onnxruntime", "onnx"),
        (safetensors_files.timm, "timm", "timm"),
        (huggingface.huggingface, "transformers", "transformers"),
    ],
)  # fmt: skip
def test_a_missing_library(export, module, extra, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'ssl-xcit\[{extra}\]'"):
        export(weights, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_hold(weights, capsys):
    torch.save(XCiT(32, 1, 2, patch_size=4).state_dict(), "p4.pth")
    assert run("export", "ckpt=p4.pth", "format=[timm,safetensors]") == 2
    captured = capsys.readouterr()
    assert "timm: not exported: timm's XCiT has patches of 8 and 16" in captured.out
    assert "1 of 2 formats were not exported" in captured.err
    assert Path("export/p4.safetensors").is_file()
    notes = safetensors_files.bfloat16(weights, Path("x")).notes
    assert "k-NN was not measured: there are no labelled images (eval_data.root=DIR)" in notes


def test_push_only_when_asked(weights, tmp_path, monkeypatch):
    sent = []

    def upload(repo_id, folder_path):
        sent.append(sorted(p.name for p in Path(folder_path).iterdir()))
        return f"https://hub/{repo_id}"

    hub = mock.Mock(upload_folder=upload)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)  # the token is its own affair
    with pytest.raises(UserError, match="push=name must be USER/NAME"):
        huggingface.huggingface(weights, tmp_path / "x", push="name")
    assert not list(tmp_path.iterdir())
    huggingface.huggingface(weights, tmp_path / "x")
    assert not sent
    hub.create_repo.assert_not_called()
    exported = huggingface.huggingface(weights, tmp_path / "x", push="me/net")
    assert "pushed: https://hub/me/net" in exported.notes
    assert sent == [["README.md", "config.json", "model.safetensors"]]
    hub.create_repo.assert_called_once_with("me/net", private=True, exist_ok=True)
    assert 'from_pretrained("me/net")' in (tmp_path / "x-huggingface/README.md").read_text()
    huggingface.huggingface(weights, tmp_path / "x", push="me/net", private=False)
    hub.create_repo.assert_called_with("me/net", private=False, exist_ok=True)


def test_push_without_network(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(RunFailed, match=r"push=me/net: .*`hf upload me/net") as error:
        huggingface.huggingface(weights, tmp_path / "x", push="me/net")
    assert "\n" not in str(error.value)
    assert (tmp_path / "x-huggingface/model.safetensors").is_file()


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
