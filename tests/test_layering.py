"""Which part of the project may import which; the picture is in CONTRIBUTING.md."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the bottom up; a part imports only parts above it in this list, and itself.
LAYERS = [
    {"version", "optional", "interrupt"},
    {"kernels"},
    {"parallel"},
    {"sections", "documents", "norms"},
    {"config"},
    {"sharded_sections", "initialization", "fp8", "layer_cost"},
    {"providers", "cost"},
    {"core_attention", "gated_delta_net", "mamba2", "scaling", "doctor"},
    {"attention"},
    {"hybrid"},
    {"training", "hf"},
]
# A pattern is text, which the configuration checks and the layers are built from; neither module imports a layer.
TEXT = {"megatron_gdn.hybrid.pattern"}


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "megatron_gdn":
            found |= {f"megatron_gdn.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in ("megatron_gdn", "tools", "examples", "tests")}


def part(name: str) -> str:
    return name.split(".")[1]


def test_the_package_is_layered():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for path in sorted((ROOT / "megatron_gdn").rglob("*.py")):
        own = path.relative_to(ROOT).with_suffix("").parts[1]
        if own == "__init__":
            continue
        for name in imports(path) - TEXT:
            assert name.startswith("megatron_gdn."), f"{path} imports {name}"
            assert part(name) == own or level[part(name)] < level[own], f"{path} imports {name}"
    (pattern,) = TEXT
    assert not imports(ROOT / f"{pattern.replace('.', '/')}.py")


def test_tools_are_used_by_nobody_below_them():
    for folder in ("tools", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            allowed = ("megatron_gdn", "tools") if folder == "tools" else ("megatron_gdn", "tools", "examples")
            assert all(name.split(".")[0] in allowed for name in imports(path)), path
    for path in sorted((ROOT / "tools/preprocess").glob("*.py")):
        assert not any(name.startswith("tools.convert") for name in imports(path)), path
