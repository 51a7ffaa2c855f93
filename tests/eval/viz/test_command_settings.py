"""Settings of the commands of pictures and pages that are refused, each with its key and what is
allowed.
"""

import re
from functools import cache
from typing import get_type_hints

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_method
from omegaconf import OmegaConf

from ssl_xcit.errors import UserError
from ssl_xcit.eval.viz.snapshots import Snapshots
from ssl_xcit.utils.validation import Checker, parse

NEEDED = {
    "atlas": ["ckpt=x"], "film": ["ckpt=x", "video=x"], "report": [], "sweep": ["dir=x"],
    "search": ["index=x", "image=x"], "visualize": ["ckpt=x"],
}  # fmt: skip
WHOLE, NETWORK, SHARE = "a whole number of at least 1", "teacher or student", "and of at most 1"
BLOCK, SWITCH, PATCH = "1 or 2", "true or false", "as fractions 0.0 to 1.0"
KINDS = "some of attention, pca, channels, neighbours, prototypes"
REFUSED = [
    ("atlas", "part=validation", "test, train or all"),
    ("atlas", "max_images=0", WHOLE),
    ("atlas", "thumbnail=1000", "at least 8 and of at most 256"),
    ("atlas", "perplexity=0", "a number of at least 1"),
    ("atlas", "seed=-1", "a whole number of at least 0"),
    ("atlas", "num_workers=-1", "or null"),
    ("atlas", "which=both", NETWORK),
    ("atlas", "device=7", "text"),
    ("film", "kind=mask", "attention or pca"),
    ("film", "head=0", f"{WHOLE} or null"),
    ("film", "block=3", BLOCK),
    ("film", "size=big", f"{WHOLE} or null"),
    ("film", "every=0", WHOLE),
    ("film", "fps=0", "below 1001"),
    ("film", "fps=0.0001", "below 1001"),
    ("film", "max_seconds=0", "a number above 0 or null"),
    ("film", "overlay=2", SHARE),
    ("film", "side_by_side=1", SWITCH),
    ("film", "which=both", NETWORK),
    ("report", "which=both", NETWORK),
    ("report", "max_images=1", "a whole number of at least 2"),
    ("search", "k=0", WHOLE),
    ("search", "k=2.5", WHOLE),
    ("sweep", "top=0", WHOLE),
    ("visualize", "kinds=[]", KINDS),
    ("visualize", "kinds=[attention,pictures]", KINDS),
    ("visualize", "kinds=7", KINDS),
    ("visualize", "over_time=1", SWITCH),
    ("visualize", "size=large", f"{WHOLE} or null"),
    ("visualize", "block=3", BLOCK),
    ("visualize", "block=true", BLOCK),
    ("visualize", "mass=0", f"above 0 {SHARE}"),
    ("visualize", "mass=.nan", f"above 0 {SHARE}"),
    ("visualize", "overlay=2", SHARE),
    ("visualize", "max_images=0", WHOLE),
    ("visualize", "columns=0", WHOLE),
    ("visualize", "teacher_temp=0", "a number above 0 or null"),
    ("visualize", "threshold=.inf", "a number or null"),
    ("visualize", "which=both", NETWORK),
    *(("visualize", f"patch={patch}", PATCH) for patch in
      ("5", "[]", "[0.5]", "[1,2,3]", "[-1,2]", "[0.5,1.5]", "[a,b]", "[.nan,0.5]", "[true,1]",
       "[0.5,2]")),
]  # fmt: skip


@cache
def composed(command):
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        return compose(command, overrides=NEEDED[command])


def parsed(command, *words):
    cfg = OmegaConf.merge(composed(command), OmegaConf.from_dotlist(list(words)))
    (hint,) = (h for n, h in get_type_hints(get_method(cfg.main)).items() if n != "return")
    return parse(hint, cfg)


@pytest.mark.parametrize(("command", "word", "allowed"), REFUSED)
def test_a_setting_that_is_refused(command, word, allowed):
    key = word.partition("=")[0]
    with pytest.raises(UserError, match=rf"^{key}=.* must be .*{re.escape(allowed)}"):
        parsed(command, word)


@pytest.mark.parametrize("command", NEEDED)
def test_the_defaults_are_allowed(command):
    assert parsed(command).main == f"ssl_xcit.eval.commands.{command}.main"


@pytest.mark.parametrize("word", ["patch=null", "patch=[0.5,1]", "patch=[120,300]", "kinds=pca"])
def test_other_forms_of_a_setting(word):
    parsed("visualize", word)


@pytest.mark.parametrize("options", [{"images": 0}, {"moments": 1}, {"size": 8}, {"moments": True}])
def test_snapshots_that_are_refused(options):
    ((key, _),) = options.items()
    target = f"{Snapshots.__module__}.{Snapshots.__name__}"
    with pytest.raises(UserError, match=rf"callbacks\.snapshots\.{key}=.* must be a whole number"):
        Checker({}).target({"_target_": target, **options}, "callbacks.snapshots")
