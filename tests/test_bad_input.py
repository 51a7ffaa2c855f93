"""Bad input of every command: one line that names the fix, exit 2, nothing left behind."""

import pytest
import torch
from commands import images, run


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


BAD = [
    (["pretrain", "optim.lrr=1"], "optim.lrr: no such setting; did you mean optim.lr?"),
    (["pretrain", "epoch=1"], "did you mean epochs?"),
    (["pretrain", "augment.global_sizes=1"], "did you mean augment.global_size?"),
    (["pretrain", "nonsense"], "no file or folder of this name, and settings are typed as"),
    (["pretrain", "few"], "set batch_size=3 or less"),
    (["pretrain", "--data", "few"], "without dashes, as data.root=few"),
    (["pretrain", "--batch-size=8"], "without dashes, as batch_size=8"),
    (["pretrain", "--lr", "0.1"], "without dashes, as optim.lr=0.1"),
    (["pretrain", "epochs", "=", "3"], "one word, epochs=3"),
    (["pretrain", "help"], "ssl-xcit pretrain --help"),
    (["pretrain", "data=few"], "images are named with data.root=few"),
    (["pretrain", "data=~/none"], "images are named with data.root=~/none"),
    (["pretrain", "root=few"], "did you mean data.root?"),
    (["pretrain", "data_root=few"], "did you mean data.root?"),
    (["train"], "did you mean pretrain?"),
    (["report", "few"], "such as ssl-xcit report run=runs/photos"),
    (["eval", "few"], "a folder without checkpoints"),
    (["embed", "few"], "ckpt is needed"),
    (["check", "none"], "no file or folder of this name"),
    (["pretrain", "data.root=few\r"], r"few\r: no such folder; data.root ends in \r: was the"),
    (["pretrain", "data.root=few\xa0"], r"few\xa0: no such folder; data.root ends in \xa0"),
    (["pretrain", "data.root=\u200bfew"], r"data.root begins with \u200b"),
    (["pretrain", "seed=1\r"], r"seed=1\r must be a whole number of at least 0; seed ends in \r"),
    (["pretrain", "\u200bseed=1"], r"a word begins with \u200b"),
    (["pretrain", "data.root=few", "\r"], r"\r: was the script saved with Windows line ends?"),
    (["pretrain\r"], "did you mean pretrain?"),
    (["pretrain", "data.root=two\nlines[red]\x1b[2J"], r"two\nlines[red]\x1b[2J: no such folder"),
    (["check", "data.root=caf\udce9"], r"caf\udce9: no such folder"),
    (["pretrain", "model=xcit_smal_12_p16"], "did you mean xcit_small_12_p16?"),
    (["pretrain", "data=imagnet"], "did you mean imagenet?"),
    (
        ["pretrain", "evaluation=fast"],
        "evaluation=fast: no such option; there are head, published, standard",
    ),
    (["pretrain", "~evaluation"], "evaluation is needed: add evaluation=...; removed by ~"),
    (["pretrian"], "did you mean pretrain?"),
    (["pretrain", "data=folder"], "data.root is needed"),
    (["pretrain", "data=folder", "data.root=none"], "no such folder"),
    (["pretrain", "data=folder", "data.root=empty"], "no images in it or below"),
    (["pretrain", "data=folder", "data.root=broken", "batch_size=8"], "can be read"),
    (["pretrain", "data=folder", "data.root=few"], "set batch_size=3 or less"),
    (["pretrain", "data=cifar10"], "data.download=true"),
    (["pretrain", "data=cifar10", "data.download=true"], "no network?"),
    (["pretrain", "eval_data=folder", "eval_data.root=few"], "outside class folders"),
    (["pretrain", "trainer.devices=99", "trainer.accelerator=cpu"], "set trainer.devices=1"),
    (["pretrain", "trainer.precision=16-mixed"], "bf16-mixed"),
    (["pretrain", "compile=true", "checkpoint_blocks=true"], "set one of them"),
    (["pretrain", "trainer.accelerator=abacus"], "abacus"),
    (["pretrain", "budget=soon"], "such as 90s, 10m, 2h"),
    (["pretrain", "budget=1h", "max_steps=9"], "set one of them"),
    (["pretrain", "max_steps=0"], "max_steps=0"),
    (["pretrain", "trainer=slurm", "nodes=4"], "there is no sbatch here"),
    (["pretrain", "trainer=slurm", "nodes=0"], "nodes=0"),
    (["pretrain", "nodes=4"], "nodes"),
    *([] if torch.cuda.is_available() else [
        (["pretrain", "trainer.gradient_exchange=bfloat16"], "is for GPUs"),
    ]),
    *([] if torch.cuda.is_available() else [(["pretrain", "trainer=ddp"], "trainer: ")]),
    (["pretrain", "model.patch_size=7"], "4, 8 and 16"),
    (["pretrain", "epochs=abc"], "epochs=abc"),
    (["pretrain", "optim.min_lr=null"], "optim.min_lr=null must be a number of at least 0"),
    (["pretrain", "optim.optimizer.betas=[2,3]"], "optim.optimizer"),
    (["pretrain", "model.in_chans=5"], "ssl-xcit stats preprocess.channels=5"),
    (["pretrain", "model.in_chans=1", "augment=torchvision"], "augment=fused"),
    (["pretrain", "preprocess.channels=1"], "set model.in_chans alone"),
    (["pretrain", "preprocess.stats=none.json"], "make it with ssl-xcit stats"),
    (["pretrain", "preprocess.stats=good.txt"], "not a file of ssl-xcit stats"),
    (["pretrain", "preprocess.value_range=[9,1]"], "[low,high]"),
    (["pretrain", "trainer.accumulate=33"], "a device has 32 images a step"),
    (["pretrain", "+trainer.accumulate_grad_batches=2"], "set trainer.accumulate"),
    (["pretrain", "callbacks.checkpoints.milestone_every=7"], "a multiple of every_steps=100"),
    (["pretrain", "data=list", "data.file=none.txt"], "no such file"),
    (["pretrain", "data=list", "data.file=good.txt"], "set data.root=DIR"),
    (["pretrain", "data=shards", "data.root=few"], "no tar shards"),
    (["pretrain", "data=shards", "data.root=few", "data.window=0"], "data.window=0"),
    (["pretrain", "data=shards", "data.root=few", "data.cache_gb=0"], "data.cache_gb=0"),
    (["pretrain", "data.root=nope://bucket/train"], "nope:// is not known; s3://"),
    (["check", "data.root=http://127.0.0.1/x-{a..b}.tar"], "braces hold two numbers"),
    (["pretrain", "data.root=memory://none/train"], "no such bucket, folder or file (404)"),
    (["pretrain", "data=arrays", "data.file=none.npy"], "no such file"),
    (["pretrain", "data=arrays", "data.file=good.txt"], "not a .npy file"),
    (["pretrain", "data=huggingface", "data.root=few"], "not a set of Dataset.save_to_disk"),
    (["pretrain", "data=folder", "data.root=null"], "name at least one folder"),
    (["pretrain", "data=folder", "data.root=~/none such (1)"], "/none such (1): no such folder"),
    (["check"], "data.root is needed"),
    (["check", "data.root=few", "out=good.txt/x"], "no folder to write to"),
    (["stats", "data.root=few", "out=good.txt/x.json"], "no folder to write to"),
    (["shard", "data.root=few", "out=good.txt"], "no folder to write to"),
    (["check", "data.root=none"], "no such folder"),
    (["doctor", "num_workers=-1"], "num_workers=-1 must be a whole number of at least 0"),
    (["stats", "data.root=broken"], "can be read"),
    (["stats", "data.root=few", "preprocess.channels=5"], "preprocess.channels=5"),
    (["shard", "data.root=few"], "out is needed"),
    (["shard", "data.root=few", "out=tars"], "holds other tars"),
    (["shard", "data.root=few", "out=o", "data.labels=true"], "outside class folders"),
    (["pretrain", "+trainer.gradient_clip_val=1"], "objective.clip_norm"),
    (["pretrain", "objective.by_steps_and_images=[]"], "a row without"),
    (["pretrain", "augment.blur_prob=[1.0]"], "augment.blur_prob=[1.0] must be 3"),
    (["pretrain", "~callbacks.metrics"], "callbacks.metrics"),
    (["pretrain", "eval_data=folder", "eval_data.root=broken_labels"], "can be read"),
    (["pretrain", "eval_data=folder", "eval_data.root=singles"], "no test images are left"),
    (["eval"], "ckpt is needed"),
    (["eval", "ckpt=5", "eval_data=photos"], "no such file"),
    *([] if torch.cuda.is_available() else [
        (["eval", "ckpt=good.pth", "device=cuda", "eval_data=photos"], "device=cuda"),
    ]),
    (["eval", "ckpt=none.ckpt"], "no such file"),
    (["eval", "ckpt=empty"], "without checkpoints"),
    (["eval", "ckpt=cut.pth", "eval_data=photos"], "truncated"),
    (["eval", "ckpt=good.pth", "model=xcit_small_12_p8", "eval_data=photos"],
     "xcit_nano_12_p16, not xcit_small_12_p8"),
    (["eval", "ckpt=good.pth"], "add eval_data=photos"),
    (["eval", "ckpt=good.pth", "eval_data=none"], "no labelled images"),
    (["eval", "ckpt=good.pth", "eval_data=folder", "eval_data.root=few"], "outside class folders"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_that_names_the_fix(tmp_path, capsys, words, message):
    from ssl_xcit import create_model

    for name in ("empty", "tars", "broken"):
        (tmp_path / name).mkdir()
    images(tmp_path / "few", 3)
    (tmp_path / "good.txt").write_text("a.png\n")
    (tmp_path / "tars/stranger.tar").write_bytes(b"")
    for i in range(40):
        (tmp_path / f"broken/{i}.jpg").write_bytes(b"<html>not found</html>")
    for name in ("a", "b"):
        images(tmp_path / "singles" / name, 1)
        images(tmp_path / "broken_labels" / name, 3)
        for file in (tmp_path / "broken_labels" / name).iterdir():
            file.write_bytes(b"")
    if words[0] == "eval":
        torch.save(create_model("xcit_nano_12_p16").state_dict(), tmp_path / "good.pth")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:1000])
    before = sorted(tmp_path.rglob("*"))
    assert run(*words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert message in lines[0]
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written
