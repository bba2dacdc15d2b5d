"""What strangers run as remote code: few lines, torch and transformers only, nothing that makes a reviewer stop."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

FOLDER = Path(__file__).parents[2] / "modeling_querit"
FILES = ["modeling_querit.py", "pipeline_querit.py", "prompting_querit.py", "scoring_querit.py"]
STANDARD = {
    "collections", "copy", "dataclasses", "functools", "inspect", "itertools", "math", "numbers", "operator", "os",
    "pathlib", "re", "shutil", "time", "typing",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"malloc_trim", "system", "popen", "fork", "register", "register_at_fork"}
LINES = 1000


def trees() -> list[tuple[str, ast.Module]]:
    return [(name, ast.parse((FOLDER / name).read_text(encoding="utf-8"))) for name in FILES]


def test_four_files_and_less_than_a_thousand_lines():
    assert sorted(path.name for path in FOLDER.glob("*.py")) == ["__init__.py", *FILES]
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == {*FILES, "__init__.py", "chat_template.jinja"}
    assert (
        sum(len((FOLDER / name).read_text(encoding="utf-8").splitlines()) for name in (*FILES, "__init__.py")) < LINES
    )


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_more_than_torch_and_transformers(name):
    tree = dict(trees())[name]
    found = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            (own if node.level else found).add(node.module.split(".")[0])
    assert found - STANDARD <= {"torch", "transformers", "tqdm"}  # transformers needs tqdm itself
    # One direction: what reads text knows nothing of what computes, and that nothing of what is called.
    assert (
        own
        <= {
            # for transformers' eyes only, see below
            "modeling_querit.py": {"pipeline_querit", "prompting_querit", "scoring_querit"},
            "prompting_querit.py": set(),
            "scoring_querit.py": {"prompting_querit"},
            "pipeline_querit.py": {"prompting_querit", "scoring_querit"},
        }[name]
    )


def test_nothing_a_reviewer_would_stop_at():
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                # torch.ops is no public API; `x.__class__ = ...` makes an object another one.
                assert not (isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("torch", "ops")), name
                assert not (node.attr == "__class__" and isinstance(node.ctx, ast.Store)), name
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in FORBIDDEN_CALLS, f"{name}:{node.lineno}"
                assert getattr(node.func, "attr", "") not in FORBIDDEN_METHODS, f"{name}:{node.lineno}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/proc", "/sys", "/dev")), name
        # When imported it defines, and checks the version of transformers; it calls nobody to change anything.
        for node in tree.body:
            calls = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            assert not calls, f"{name}:{node.lineno}"


def test_the_model_imports_the_pipeline_never():
    script = "import sys; sys.path.insert(0, sys.argv[1]); import types; package = types.ModuleType('p'); "
    script += "package.__path__ = [sys.argv[1]]; sys.modules['p'] = package; import p.modeling_querit; "
    script += "print([name for name in sys.modules if name.startswith('p.')])"
    done = subprocess.run([sys.executable, "-c", script, str(FOLDER)], capture_output=True, text=True)
    assert done.stdout.strip() == "['p.modeling_querit']", done.stderr


def test_on_an_old_transformers_it_says_so_in_one_sentence(monkeypatch):
    """Seen with transformers 4.57.6 itself."""
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    path = FOLDER / "modeling_querit.py"
    wanted = r"need transformers 5\.19\.0 or newer, not 4\.57\.6: pip install -U transformers$"
    with pytest.raises(ImportError, match=wanted):
        exec(compile(path.read_text(encoding="utf-8"), path, "exec"), {"__name__": "old", "__file__": str(path)})  # noqa: S102
    # An old one copies only what this file itself names, and opens all before any runs: FileNotFoundError else.
    named = re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"{name}.py" for name in named} == {*FILES} - {path.name}
