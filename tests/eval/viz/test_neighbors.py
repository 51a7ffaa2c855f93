"""Neighbours against brute force in float64, and as `visualize` shows them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from brute_force import check_nearest, exact_neighbours
from commands import run
from PIL import Image
from tiny_run import make_run

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import UserError
from ssl_xcit.eval.viz.grids import FRAME, MARGIN, SIDE, SPLIT, WRONG
from ssl_xcit.eval.viz.neighbors import nearest_rows
from ssl_xcit.models.weights import load_backbone

QUICK = ["ckpt=run", "num_workers=0", "cache=false"]
OWN = ["eval_data=folder", "eval_data.root=own", "eval_data.resize=32", "eval_data.size=32"]


def visualize(*words):
    """What the command wrote of the neighbours."""
    assert run("visualize", "kinds=neighbours", *QUICK, *words) == 0
    content = json.loads(Path("run/visualize/visualize.json").read_text())
    return content["results"]["run"]["neighbours"]


def brute_force(bank, row, k):
    """The nearest others of a row of the bank."""
    return [i for i in exact_neighbours(bank, bank[row], len(bank)) if i != row][:k]


def neighbours(bank, chosen, k):
    """Of rows of the bank itself."""
    rows = np.asarray(chosen, np.int64)
    return nearest_rows(bank, bank[rows], rows, k)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_nearest_others(dtype):
    bank = np.random.default_rng(0).normal(size=(200, 16)).astype(dtype)
    chosen = [0, 199, 57, 57]
    indices, similarity = neighbours(bank, chosen, 7)
    assert indices.dtype == np.int64
    assert indices.tolist() == [brute_force(bank, row, 7) for row in chosen]
    check_nearest(bank, bank[chosen], 7, similarity, indices, np.array(chosen))


@pytest.mark.parametrize("copies", [3, 40])
def test_of_duplicates_only_the_row_itself_is_left_out(copies):
    bank = np.random.default_rng(1).normal(size=(60, 8)).astype(np.float32)
    bank[5 : 5 + copies] = bank[5]
    chosen = [5, 5 + copies - 1, 50]
    indices, similarity = neighbours(bank, chosen, 4)
    check_nearest(bank, bank[chosen], 4, similarity, indices, np.array(chosen))
    assert set(indices[0, :2]) <= set(range(6, 5 + copies))
    assert similarity.max() <= 1.0


def test_few_rows_and_rows_of_nothing():
    bank = np.eye(4, dtype=np.float32)
    bank[2] = 0
    indices, similarity = neighbours(bank, [0], 10)
    assert sorted(indices[0].tolist()) == [1, 2, 3]
    assert similarity.tolist() == [[0.0, 0.0, 0.0]]
    assert neighbours(bank, [], 2)[0].shape == (0, 2)
    with pytest.raises(UserError, match="at least 2"):
        neighbours(bank[:1], [0], 1)


def test_queries_from_elsewhere_lose_nothing():
    rng = np.random.default_rng(2)
    bank, queries = rng.normal(size=(30, 8)), rng.normal(size=(2, 8))
    bank, queries = bank.astype(np.float32), queries.astype(np.float32)
    queries[1] = bank[4]
    both = np.concatenate((bank, queries))
    indices, _ = nearest_rows(bank, queries, np.array([-1, 4]), 3)
    assert indices[0].tolist() == [i for i in brute_force(both, 30, 5) if i < 30][:3]
    assert indices[1].tolist() == brute_force(bank, 4, 3)
    assert nearest_rows(bank, queries[1:], np.array([-1]), 3)[0][0, 0] == 4


@pytest.fixture
def own(here):
    """A run, and three classes of noise in different shades; the last one holds a copy."""
    rng = np.random.default_rng(0)
    for shade, name in enumerate(("dark", "grey", "light")):
        Path("own", name).mkdir(parents=True)
        for i in range(6):
            noise = rng.integers(0, 60, (32, 32, 3)) + 70 * shade
            Image.fromarray(noise.astype(np.uint8)).save(f"own/{name}/{name}{i}.png")
    shutil.copy("own/dark/dark0.png", "own/light/copy.png")
    return here


def test_one_set_is_queried_by_its_own_images(own, capsys):
    found = visualize(*OWN, "eval_data.test_fraction=0", "columns=3")
    files = sorted(str(f) for f in Path("own").rglob("*.png"))
    assert list(found["queries"]) == files
    same, similarity, indices = [], [], []
    for name, told in found["queries"].items():
        assert told["class"] == Path(name).parent.name
        same += [n["class"] == told["class"] for n in told["neighbours"]]
        similarity.append([n["similarity"] for n in told["neighbours"]])
        indices.append([files.index(n["image"]) for n in told["neighbours"]])
    pixels = np.stack([read_image(file).transpose(2, 0, 1) for file in files])
    with torch.no_grad():
        rows = load_backbone("run")(normalise(torch.from_numpy(pixels), RGB)).numpy()
    check_nearest(rows, rows, 3, similarity, indices, np.arange(19))
    assert found["same_class"] == pytest.approx(np.mean(same), abs=1e-6)
    assert (
        f"19 queries, the 3 nearest of 19 images (own (3 class folders)); {np.mean(same):.0%}"
        in (capsys.readouterr().out)
    )
    # a frame around those of another class, and around no others
    grid = np.asarray(Image.open("run/visualize/neighbours/grid.png"))
    framed = np.array([
        [(grid[top : top + FRAME, left : left + SIDE] == WRONG).all()
         for left in range(MARGIN + SIDE + 2 * SPLIT, grid.shape[1], SIDE + MARGIN)]
        for top in range(MARGIN, grid.shape[0] - SIDE, (grid.shape[0] - MARGIN) // 19)
    ])  # fmt: skip
    assert np.array_equal(framed, ~np.array(same).reshape(19, 3))
    assert 0 < framed.sum() < framed.size
    page = Path("run/visualize/index.html").read_text()
    assert 'src="neighbours/grid.png"' in page
    assert "red frame: another class" in page


def test_files_are_queries_and_no_neighbours_of_themselves(own):
    shutil.copy("own/grey/grey1.png", "else.png")
    words = [*OWN, "eval_data.test_fraction=0", "images=[own/dark/dark0.png,else.png]"]
    queries = visualize(*words)["queries"]
    dark, other = queries["own/dark/dark0.png"], queries["else.png"]
    assert dark["class"] == "dark"  # it is an image of the set
    near = [n["image"] for n in dark["neighbours"]]
    assert near[0] == "own/light/copy.png"
    assert "own/dark/dark0.png" not in near
    assert other["class"] is None  # nobody says what it is
    assert other["neighbours"][0]["image"] == "own/grey/grey1.png"


def test_held_out_images_are_queries_where_there_are_some(own):
    words = [*OWN, "eval_data.test_fraction=0.3"]
    found = visualize(*words)
    near = {n["image"] for told in found["queries"].values() for n in told["neighbours"]}
    assert not near & found["queries"].keys()
    assert len(found["queries"]) + found["images"] == 19
    held_out = next(iter(found["queries"]))
    again = visualize(*words, f"images={held_out}")
    assert again["queries"][held_out]["class"] == Path(held_out).parent.name


@pytest.fixture
def plain(own):
    """The same images without classes."""
    Path("plain").mkdir()
    for file in Path("own").rglob("*.png"):
        shutil.copy(file, "plain")


def test_a_folder_without_classes(plain, capsys):
    Path("plain/broken.png").write_bytes(b"no image")
    found = visualize(*OWN, "eval_data.root=plain", "max_images=5")
    assert found["same_class"] is None
    assert (len(found["queries"]), found["images"]) == (5, 19)
    assert "broken.png" in capsys.readouterr().err


def test_a_run_without_labels_has_its_training_images(plain):
    shutil.rmtree("run")
    make_run(Path("run"), overrides=[f"data.root={Path('plain').absolute()}"], data="folder")
    found = visualize()
    assert found["images"] == 19
    assert found["data"] == "training images of run"


def test_without_a_data_set(own, refused):
    for words, said in (
        (["ckpt=net.pth"], "no run folder"),
        (["ckpt=run", "eval_data=none"], "the images of a data set are needed"),
        (["ckpt=run", "eval_data=folder"], "the images of a data set are needed"),
        (["ckpt=run", "eval_data=folder", "eval_data.root=nowhere"], "nowhere"),
    ):
        refused(said, "visualize", "kinds=[neighbours]", *words)
