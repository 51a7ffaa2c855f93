"""A run folder as training leaves it, without training: sharp random networks, steps 3 and 6.
Settings of one that is trained.
"""

import json

import torch
from commands import EVALUATION, NO_ONLINE

from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.objectives.dino import Center
from ssl_xcit.training.module import make_networks

K = 24
PLAN = {
    "teacher_temp_start": 0.02, "teacher_temp": 0.06, "teacher_temp_epochs": 3.0,
    "steps_per_epoch": 2.0,
}  # fmt: skip

DROPPED = ("evaluation", "callbacks.snapshots", "epochs", "callbacks.online")
PLAIN = [w for w in NO_ONLINE if not w.startswith(DROPPED)]
PLAIN += ["~callbacks.online", "model=xcit_micro_4_p8", "data=folder", "data.root=own", "epochs=3"]
NO_LABELS = "eval_data=none"
LABELS = ["eval_data=folder", "eval_data.root=own", "evaluation.evaluators.knn.k=[1]",
          "evaluation.evaluators.linear=null", "evaluation.baselines=null",
          *(word for word in EVALUATION if word.endswith("=null"))]  # fmt: skip
PICTURES = ["callbacks.snapshots.images=3", "callbacks.snapshots.moments=4",
            "callbacks.snapshots.size=64"]  # fmt: skip


def sharp_backbone(seed=0, tokens_norm=True, patch_size=8):
    """Whose attention is far from flat."""
    torch.manual_seed(seed)
    backbone = XCiT(32, 2, 4, patch_size=patch_size, tokens_norm=tokens_norm)
    with torch.no_grad():
        for block in backbone.cls_attn_blocks:
            block.attn.qkv.weight.mul_(30)
            block.attn.qkv.bias.normal_()
        for block in backbone.blocks:
            block.attn.qkv.weight.mul_(20)
            block.attn.qkv.bias.normal_()
            block.attn.temperature.mul_(torch.tensor([1.0, 4.0, 8.0, 0.5])[:, None, None])
    return backbone.eval()


def make_run(folder, seed=0, overrides=(), data="photos", patch_size=8):
    """RUN/checkpoints/step-*.ckpt, RUN/run.json."""
    (folder / "checkpoints").mkdir(parents=True)
    for step in (3, 6):
        backbone = sharp_backbone(seed + step, patch_size=patch_size)
        head = DINOHead(32, K, hidden_dim=16, bottleneck_dim=8)
        with torch.no_grad():
            for part in head.mlp[::2]:  # the linear layers
                part.weight.mul_(40)
        other = sharp_backbone(seed + step + 100, patch_size=patch_size)
        student, teacher = make_networks(backbone, head, other)
        objective = torch.nn.ModuleDict({"center": Center(K)})
        objective["center"].center.normal_(std=0.05)
        parts = {"student": student, "teacher": teacher, "objective": objective}
        module = torch.nn.ModuleDict(parts)
        content = {
            "state_dict": module.state_dict(),
            "architecture": backbone.architecture,
            "preprocess": {},
            "global_step": step,
        }
        torch.save(content, folder / "checkpoints" / f"step-{step:06d}.ckpt")
    choices = {"data": data, "eval_data": data}
    run = {"overrides": list(overrides), "choices": choices, "plan": PLAN}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def published(path, seed=0):
    """A bare backbone, as published files hold it."""
    torch.save(sharp_backbone(seed).state_dict(), path)
    return path
