"""Pages of the site that are made when it is built (a hook of mkdocs, see mkdocs.yml): the README,
CONTRIBUTING and CHANGELOG, every setting as its yaml says it, and the public names of Python.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
NAMES = {
    "Runs": ["ssl_xcit.runs.pretrain", "ssl_xcit.runs.finetune", "ssl_xcit.runs.Run"],
    "Backbones": [
        "ssl_xcit.models.weights.load_backbone",
        "ssl_xcit.models.xcit.create_model",
        "ssl_xcit.models.xcit.XCiT",
        "ssl_xcit.models.xcit.Features",
    ],
    "Objectives": ["ssl_xcit.objectives.objective.Objective", "ssl_xcit.objectives.prototype_loss.dino_loss"],
    "Data": ["ssl_xcit.data.sources.Source", "ssl_xcit.data.sources.LabelledPair"],
    "Evaluation": [
        "eval.evaluators.knn.knn_predict",
        "eval.evaluators.protocol.Evaluator",
        "eval.evaluators.protocol.Task",
    ],
    "Errors": ["ssl_xcit.errors"],
}  # fmt: skip


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages."""
    made = {place: (ROOT / name).read_text() for name, place in PAGES.items()}
    made |= {"settings.md": settings_page(), "python.md": python_page()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links of the checkout lead to pages of the site; what it has no page of is no link."""
    made = page.file.src_path in PAGES.values()

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:|#|$", target):
            return match[0]
        inside = path.removeprefix("../") if not made else path
        if made and path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{f'#{anchor}' if anchor else ''})"
        if (made or path.startswith("../")) and inside in PAGES:
            return f"[{text}]({PAGES[inside]}{f'#{anchor}' if anchor else ''})"
        return text if made or path.startswith("../") else match[0]

    return re.sub(r"\[([^\]\[]+|!\[[^\]]*\]\([^)]*\))\]\(([^)\s]*)\)", link, markdown)


def settings_page() -> str:
    """Every yaml in `conf/`, commands first, as it stands there with its comments."""
    conf = ROOT / "conf"
    lines = ["# Settings", "", "What every command takes, with its default and a comment, then the options of each group:"
             " `GROUP=OPTION` chooses one, `KEY=VALUE` changes a setting (`ssl-xcit COMMAND --help`)."]  # fmt: skip
    groups = sorted(
        folder for folder in conf.iterdir() if folder.is_dir() and folder.name != "hydra"
    )
    for file in sorted(conf.glob("*.yaml")):
        lines += ["", f"## ssl-xcit {file.stem}", "", "```yaml", file.read_text().rstrip(), "```"]
    for group in groups:
        lines += ["", f"## {group.name}="]
        for file in sorted(group.glob("*.yaml")):
            title = f"### {group.name}={file.stem}"
            lines += ["", title, "", "```yaml", file.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """Public names, by what they are for."""
    lines = ["# Python", "", "`import ssl_xcit` gives `pretrain`, `finetune`, `Run`, `load_backbone` and `create_model`; "
             "`eval` is installed as `ssl_xcit.eval`. Shapes are in the signatures: B images, C width, H and W pixels."]  # fmt: skip
    for title, names in NAMES.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", f"::: {name}", "    options:", "      heading_level: 3"]
    return "\n".join(lines) + "\n"
