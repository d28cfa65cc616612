"""The rules of the house, read from the sources: floors, widths, the size of a loop, the README."""

import ast
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from house import METHODS, loops

FLOORS = {  # file or folder -> what of ours it may import, and what else
    "gpt.py": ("", "torch"),
    "data": ("data", "torch numpy tiktoken"),
    "data/batch.py": ("data gpt", "torch numpy tqdm"),  # a bar where a file is large
    "data/chat.py": ("data", "jinja2"),  # which comes with torch
    "data/hf_tokenizer.py": ("data", "tokenizers"),
    "data/hf_export.py": ("data", "tokenizers"),
    "training": ("gpt data training", "torch tqdm"),
    "training/hf.py": ("gpt data", "torch safetensors"),
    "training/loggers.py": ("data", "torch wandb"),
    "training/function.py": ("data", "torch numpy"),  # which have a state that it puts back
    "export.py": ("gpt data training", "torch"),
    "evaluate.py": ("gpt data training", "torch"),
    "compare.py": ("data training analysis", "torch"),
    "analysis": (f"gpt data training evaluate analysis {' '.join(METHODS)}", "torch numpy"),
    "analysis/bench.py": (f"gpt data training analysis {' '.join(METHODS)}", "torch tqdm"),
    "analysis/peers.py": ("data training analysis", "torch trl transformers tokenizers datasets"),
    "analysis/parity.py": ("data training analysis", "torch tqdm"),
    "analysis/sides.py": (
        "gpt data training analysis",
        "torch trl transformers tokenizers datasets",
    ),
    "analysis/derived_ppo.py": ("", "torch transformers"),
    "analysis/plugin.py": ("analysis data", "pytest"),
    "analysis/plots.py": (f"data training analysis {' '.join(METHODS)}", "matplotlib"),
}
FLOORS |= {f"{name}.py": ("gpt data training evaluate", "torch") for name in METHODS}
FOLDERS = ("", "data", "training", "analysis")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
OURS = {path.stem for path in ROOT.glob("*.py")} | {"data", "training", "analysis"}
BELOW = [path for path in SOURCES if path.parent.name != "analysis" and path.stem != "compare"]
SYMBOLS = "alpha beta gamma lam eps eps_low eps_high eps_v tau eta rho sigma kl_coef vf_coef"
SYMBOLS = {*SYMBOLS.split(), "adv", "logp", "ref_logp", "old_logp", "label_smoothing", "flip"}


def name(path):
    return str(path.relative_to(ROOT))


def imports(tree):
    """-> the top-level names that a source imports, and those that it imports by name"""
    found = set()
    for x in ast.walk(tree):
        if isinstance(x, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in x.names}
        elif isinstance(x, ast.ImportFrom):
            found.add(x.module.partition(".")[0])
        elif isinstance(x, ast.Call) and ast.unparse(x.func).endswith("import_module"):
            found |= {a.value for a in x.args if isinstance(a, ast.Constant)}
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_down_the_floors(path):
    """No method script imports another, and nothing but analysis/ and compare.py imports one."""
    floor = name(path) if name(path) in FLOORS else path.parent.name
    ours, others = (set(words.split()) for words in FLOORS[floor])
    found = imports(ast.parse(path.read_text()))
    assert found & OURS <= ours and found - OURS <= others


def looked_up(tree):
    """Yields (option, how) wherever a source reads an option by a string, as getattr(o, "x"): an
    arrow to another file that no import shows. None: a name that is computed."""
    for x in ast.walk(tree):
        options = key = how = None
        if isinstance(x, ast.Subscript):
            how, options, key = "[]", ast.unparse(x.value), x.slice
        elif isinstance(x, ast.Call) and len(x.args) > 1:
            how, options, key = ast.unparse(x.func), ast.unparse(x.args[0]), x.args[1]
        forms = ("[]", "getattr", "hasattr", "setattr")
        if how in forms and re.fullmatch(r"((\w+\.)*o|(vars|asdict)\((\w+\.)*o\))", options):
            yield key.value if isinstance(key, ast.Constant) else None, how


@pytest.mark.parametrize("path", BELOW, ids=name)
def test_no_option_is_read_by_a_string(path):
    found = set(looked_up(ast.parse(path.read_text())))
    loops_over_fields = {(None, "getattr")}
    allowed = {
        "training/options.py": {*loops_over_fields, ("check", "hasattr")},
        "training/run.py": loops_over_fields,
    }
    assert found <= allowed.get(name(path), set())


def test_the_four_forms_are_seen():
    text = 'o["a"]; getattr(self.o, "b"); hasattr(o, "c"); vars(run.o)["d"]; o.e; x["f"]'
    assert {option for option, _ in looked_up(ast.parse(text))} == {"a", "b", "c", "d"}


def test_training_knows_no_symbol_of_a_paper():
    theirs = {ROOT / "training/lora.py", ROOT / "training/sampling.py"}  # α/r; a column logp
    for path in {*(ROOT / "training").glob("*.py")} - theirs:
        for x in ast.walk(ast.parse(path.read_text())):
            found = {getattr(x, field, None) for field in ("id", "arg", "attr", "name")}
            assert not found & SYMBOLS, f"{name(path)}:{x.lineno}"


def test_lines_have_100_columns():
    for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]:
        for i, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{name(path)}:{i} has {len(line)} columns"


@pytest.mark.parametrize("script", METHODS)
def test_set_up_and_loop_fit_a_screen(script):
    found = loops((ROOT / f"{script}.py").read_text())
    assert found and ("main" in found or script == "rlaif")
    for function, (setup, loop) in found.items():
        assert setup <= 14 and loop <= 50, f"{function}: {setup} lines, then {loop}"


def test_dapo_differs_from_grpo_in_what_dapo_is():
    if not shutil.which("diff"):
        pytest.skip("no diff here")
    command = ["diff", ROOT / "grpo.py", ROOT / "dapo.py"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    assert 0 < sum(line[0] in "<>" for line in said.splitlines()) <= 120


def test_readme_is_a_front_door():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 12_000
    fences = text.split("```")
    prose = "\n".join(fences[::2])
    for part in re.split(r"\n\n+|\n(?=- )", prose):
        if part.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\||\n", part)]
            cells = [
                re.sub(r"\]\([^)]*\)|\[", "", cell) for cell in cells
            ]  # links as they are seen
            assert max(map(len, cells)) <= 80, max(cells, key=len)
        assert part.startswith("|") or len(part) <= 400, part
    for script in METHODS:
        assert re.search(rf"^\| \[?`{script}\.py`", text, re.M), f"no row of {script}.py"
    for file in re.findall(r"\b([a-z_]+(?:\.py|/))(?= {2,}|`)", text):
        assert (ROOT / file).exists() or file == "my_rewards.py", file
    loop = next(part for part in fences if part.startswith("\nfor step in run.steps"))
    assert textwrap.indent(loop.strip(), "    ") in (ROOT / "dpo.py").read_text()
