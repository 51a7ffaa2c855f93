"""The tutorial's code, one block after another, as somebody would paste it."""

import re
from pathlib import Path

import numpy as np
import torch

from ssl_xcit import load_backbone
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise

DOC = Path(__file__).resolve().parent.parent / "docs/tutorial.md"


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys, cache):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    assert len(blocks) == 7
    scope = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{DOC.name}, block {number + 1}", "exec"), scope)  # noqa: S102
    out = capsys.readouterr().out
    assert "torch.Size([2, 128]) torch.Size([2, 128, 4, 6])" in out
    assert scope["maps"].shape == (2, 4, 4, 6)
    # against brute force over the same features
    train, test = (scope[name] / np.linalg.norm(scope[name], axis=1, keepdims=True)
                   for name in ("train", "test"))  # fmt: skip
    similarity = test @ train.T
    nearest = np.argsort(-similarity, axis=1)[:, :10]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    votes = np.zeros((len(test), 17))
    for row, (places, shares) in enumerate(zip(nearest, weights, strict=True)):
        np.add.at(votes[row], scope["train_labels"][places], shares)
    assert (votes.argmax(1) == scope["predicted"]).mean() > 0.99
    assert scope["accuracy"] > 2 / 17
    assert scope["losses"][-1] < scope["losses"][0] + 0.5
    # the command's classifier by hand, on an image of the size that it is tested at
    tuned = load_backbone("runs/windows")
    with torch.inference_mode():
        logits = tuned.head(tuned(normalise(scope["pixels"](scope["photos"].test, [0]), RGB)))
    assert np.allclose(logits.softmax(1)[0], scope["probabilities"], atol=1e-5)
    assert not torch.equal(tuned.blocks[0].norm1.weight, scope["loaded"].blocks[0].norm1.weight)
    assert scope["photos"].train.class_names[scope["probabilities"].argmax()] in out
