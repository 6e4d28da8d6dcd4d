"""What the documents name exists, public code is documented, and nothing names a registry or one person's machine."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "examples/data/README.md", "tools/convert/README.md"),
    *("megatron_gdn/fp8/README.md", "megatron_gdn/hybrid/README.md", "megatron_gdn/kernels/README.md"),
    *("megatron_gdn/parallel/context_traffic.md", "megatron_gdn/parallel/scaling.md"),
)
SOURCES = ("megatron_gdn", "tools", "examples")
SUFFIXES = (".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".txt", ".cfg", ".json", "")  # of text files

# First parts of paths that a user or a run creates.
CREATED = {"runs", "data", "corpus", "tokenizer", "checkpoints", "tensorboard", "hf", ".venv"}
ELSEWHERE = {"pretrain_gpt.py"}  # of Megatron-LM
PATH = re.compile(r"(?<![\w./=:-])(?:[\w.*-]+/)+(?:[\w.*-]+\.(?:py|md|sh|yaml|toml|json|jsonl|xz|txt))?(?![\w/])")
BARE_FILE = re.compile(r"(?<![\w./*-])[A-Za-z][\w-]*\.(?:py|md|sh|yaml|toml)(?![\w./])")
CODE = re.compile(r"```.*?```|`[^`\n]+`|\]\([^)\s]+\)", flags=re.S)


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """Files of the repository below these folders."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    return [path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts]


def name(path: Path) -> str:
    """The path as a test's name."""
    return str(path.relative_to(ROOT))


def missing(text: str, folder: Path) -> list[str]:
    """What the code spans, code blocks and links of a document name and does not exist.

    Args:
        text: Markdown.
        folder: of the document; its paths may be relative to it or to the root.
    """
    code = re.sub(r"\w+://\S+", "", "\n".join(CODE.findall(text)))
    paths = {path for path in PATH.findall(code) if path.split("/")[0] not in CREATED}
    problems = [path for path in paths if not any(any(base.glob(path.rstrip("/"))) for base in (ROOT, folder))]
    known = {path.name for path in [*ROOT.iterdir(), *files(*SOURCES, "tests", suffixes=SUFFIXES)]}
    problems += [file for file in BARE_FILE.findall(code) if file not in known | ELSEWHERE]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    problems += [f"make {target}" for target in re.findall(r"\bmake ([a-z][\w-]*)", code) if target not in targets]
    problems += [
        f"python -m {module}" for module in re.findall(r"python3? -m ([\w.]+)", code) if not importable(module)
    ]
    return sorted(set(problems))


def importable(module: str) -> bool:
    """Whether `python -m` finds it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_exists(document):
    path = ROOT / document
    assert missing(path.read_text(), path.parent) == []


def test_the_check_of_documents_finds_what_is_missing():
    good = "`make test`, `tests/ranks.py`, `tests/`, `ranks.py`, [x](../setup.py), `tests/*/test_cpu.py`, `runs/x.py`, "
    good += (
        "`python -m pytest`, `PYTHON=python3 make venv`, [y](https://example.org/no/such.md), tokens/s and no/prose.py"
    )
    assert missing(good, ROOT / "tests") == []
    bad = "`make tset` `tests/rank.py` [x](exmaples/) `python -m tools.no_such_tool` `rank.py`\n```\nmake demoo\n```\n"
    bad += "`examples/*.yml.md` `python -m no_such.tool`"
    assert missing(bad, ROOT) == sorted(
        ["make tset", "tests/rank.py", "exmaples/", "python -m tools.no_such_tool", "rank.py", "make demoo"]
        + ["examples/*.yml.md", "python -m no_such.tool"]
    )


@pytest.mark.parametrize("path", files(*SOURCES), ids=name)
def test_public_code_has_docstrings_and_scripts_a_guard(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
    assert ast.get_docstring(tree) or not tree.body, "the file has no docstring"
    if any(node.name == "main" for node in public):
        guards = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
        assert "__name__ == '__main__'" in guards, "main() needs a guard: child processes import the script"


def test_scripts_run_by_path_find_what_they_import(monkeypatch):
    """`python examples/x.py` sees installed packages and its own folder, not the root."""
    found = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: found.update(arguments))
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    for path in files("examples"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        ours = {node.module for node in nodes if (ROOT / node.module.split(".")[0]).is_dir()}
        packages = {
            module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0] for module in ours
        }
        assert packages <= set(found["packages"]), path


def test_no_list_of_dependencies_has_apex():
    lists = [ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("*requirements*.txt")]
    pattern = re.compile(r"""(?:^|["'])\s*apex(?![\w.-])""", flags=re.M | re.I)
    assert [name(path) for path in lists if pattern.search(path.read_text())] == []
    for text in ('x = ["apex"]', "x = ['apex>=0.1']", "torch\napex\n", '["Apex @ git+x"]'):
        assert pattern.search(text)


MACHINE = re.compile(r"(?<![\w.])/(?:home|Users|root|work)/\w")


def test_no_file_names_a_folder_of_one_machine():
    texts = [path for path in files(*SOURCES, "tests", ".ci", suffixes=SUFFIXES) if path.is_file()]
    # In a worktree .git is a file with the path of the repository.
    texts += [path for path in ROOT.iterdir() if path.is_file() and path.suffix in SUFFIXES and path.name != ".git"]
    found = []
    for path in texts:
        found += [f"{name(path)}: {match[0]}" for match in MACHINE.finditer(path.read_text(errors="replace"))]
    assert len(texts) > 20 and found == []
