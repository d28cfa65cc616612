"""The rules of the house, checked in the sources: floors, line widths, the size of loops, the
README."""

import ast
import graphlib
import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tokenize

import pytest
from conftest import ROOT
from house import METHODS, loops, nodes

FLOORS = {  # a folder or a file -> what of ours it may import, and what else
    "setup.py": ("", "setuptools"),
    "gpu.py": ("", "torch"),
    "packing.py": ("gpu", "torch"),
    "head.py": ("", "torch"),
    "gpt.py": ("head packing", "torch"),
    "data": ("data", "torch numpy tiktoken"),
    "data/batch.py": ("data packing", "torch numpy tqdm"),  # a bar, if a file is large
    "data/error.py": ("data", "tqdm"),  # so that a note stands above a bar
    "hf": ("gpt data hf", "torch"),
    "hf/weights.py": ("gpt data hf", "torch safetensors"),
    "hf/peft.py": ("gpt data hf", "torch safetensors"),
    "hf/hub.py": ("data", "huggingface_hub"),
    "hf/remedies.py": ("data", ""),
    "hf/tokenizer.py": ("data hf", "tokenizers"),
    "hf/template.py": ("data", "jinja2"),  # which comes with torch
    "hf/vocabulary.py": ("data", "tokenizers"),
    "training": ("gpu packing gpt data hf training", "torch tqdm"),
    "training/adamw8bit.py": ("data", "torch bitsandbytes"),
    "training/locks.py": ("data", "filelock"),  # which comes with torch
    "training/loggers.py": ("data training", "torch wandb"),
    "chat.py": ("data training", "torch"),
    "export.py": ("gpt data hf training", "torch"),
    "evaluate.py": ("data training", "torch tqdm"),
    "compare.py": ("data training analysis", "torch"),
    "analysis": (
        f"packing gpt data hf training evaluate analysis {' '.join(METHODS)}",
        "torch numpy",
    ),
    "analysis/card.py": ("data training analysis", "torch"),
    "analysis/card_parts.py": (f"gpt data training analysis {' '.join(METHODS)}", "torch"),
    "analysis/bench.py": (f"head gpt data training analysis {' '.join(METHODS)}", "torch tqdm"),
    "analysis/report.py": ("data analysis", "torch jinja2"),  # which comes with torch
    "analysis/parity.py": ("data training analysis", "torch tqdm"),
    "analysis/against_trl": (
        "gpt data hf training analysis",
        "torch trl transformers tokenizers datasets",
    ),
    "analysis/against_trl/derived_ppo.py": ("", "torch transformers"),
    "analysis/plugin.py": ("analysis data", "pytest"),
    "analysis/walk.py": ("", "matplotlib"),
    "analysis/publish.py": ("data training analysis", "torch tqdm"),
    "analysis/digest.py": ("", ""),
    "analysis/places.py": ("analysis", ""),
    "analysis/sources.py": ("analysis", ""),
    "analysis/plots.py": (f"data training analysis {' '.join(METHODS)}", "matplotlib"),
}
FLOORS |= {f"{name}.py": ("packing gpt data training evaluate", "torch") for name in METHODS}


def found(folder):
    """-> the Python files of a folder and of the folders in it, of whatever names; left out are
    those without sources of ours: hidden ones, environments, results"""
    files = sorted(folder.glob("*.py"))
    for inner in sorted(x for x in folder.iterdir() if x.is_dir()):
        ours = inner.name[0] not in "._" and inner.name not in ("out", "build")
        files += found(inner) if ours and not (inner / "pyvenv.cfg").exists() else []
    return files


ALL = found(ROOT)
SOURCES = [path for path in ALL if path.relative_to(ROOT).parts[0] != "tests"]
OURS = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in SOURCES}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ABOVE = ("analysis", "compare.py")
BELOW = [path for path in SOURCES if path.relative_to(ROOT).parts[0] not in ABOVE]
LOADED = 26_000  # nodes of ours that `python dpo.py` loads, its SFT stage included
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


def floor_of(path):
    """-> the row of FLOORS that holds for a file: its own, or that of the nearest folder"""
    places = [path, *path.parents]
    rows = [name(x) for x in places if x != ROOT and x.is_relative_to(ROOT)]
    row = next((row for row in rows if row in FLOORS), None)
    assert row, f"{rows[0]} stands on no floor: give it, or its folder, a row of FLOORS"
    return FLOORS[row]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_down_the_floors(path):
    """No method script imports another, and nothing but analysis/ and compare.py imports one."""
    ours, others = (set(words.split()) for words in floor_of(path))
    found = imports(ast.parse(path.read_text()))
    assert found & OURS <= ours, f"{name(path)} imports from a floor above: move what it needs down"
    assert found - OURS <= others, f"{name(path)} needs a package that FLOORS does not allow there"


def below(path):
    """-> the files of ours that a file imports, at its top or inside a function"""
    found = set()
    for x in ast.walk(ast.parse(path.read_text())):
        if isinstance(x, ast.Import):
            found |= {alias.name for alias in x.names}
        elif isinstance(x, ast.ImportFrom):
            found |= {x.module, *(f"{x.module}.{alias.name}" for alias in x.names)}
    files = [ROOT / f"{module.replace('.', '/')}.py" for module in found]
    return {name(file) for file in files if file in SOURCES}


def test_no_two_files_import_each_other():
    try:
        graphlib.TopologicalSorter({name(path): below(path) for path in SOURCES}).prepare()
    except graphlib.CycleError as e:
        circle = " -> ".join(e.args[1])
        raise AssertionError(f"{circle}: move what both need into a file below them") from None


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
    files = "lora sampling cache prompt_cache"  # α/r; a column logp; torch.baddbmm(alpha=)
    theirs = {ROOT / f"training/{file}.py" for file in files.split()}
    for path in {*(ROOT / "training").glob("*.py")} - theirs:
        for x in ast.walk(ast.parse(path.read_text())):
            found = {getattr(x, field, None) for field in ("id", "arg", "attr", "name")}
            assert not found & SYMBOLS, f"{name(path)}:{x.lineno}"


def test_lines_have_100_columns():
    for path in [*ALL, ROOT / "analysis/report.html.jinja"]:
        for i, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{name(path)}:{i} has {len(line)} columns: break the line"


COUNTED = """
nats? tokens? seconds? ms bytes GiB MB labels? rows? steps? pass passes loss losses responses?
numbers? constants? prompts? one two answers? samples? evaluations? runs? times once twice
sequences? lines? figures? sentences? rewards? scores? layers? processes questions? principles?
files? records? groups? updates? cards? characters? words? columns? copies copy state bar
""".split()
EACH = """
token response step pair prompt row rank run second seed phase parameter weight layer method
process example minibatch rollout evaluation answer batch word hour epoch card question group
block head machine update round task class outcome sequence number
""".split()
WORDS = {  # a habit -> (its pattern, what reads better)
    "a for per": (
        rf"\b(\d+|{'|'.join(COUNTED)}) an? ({'|'.join(EACH)})\b(?! of)",
        "nats per token",
    ),
    "where for if": (
        r"(^|[.:;] )Where\b|\b(None|nothing|True|False|0|none|empty|alone|only) where\b",
        "if, unless a place is meant",
    ),
    "nobody tells": (r"\b(told|it tells|what tells)\b", "who says, gives or shows what"),
    "nobody says": (r"\b(and|which|this) (it )?is said\b", "who says it: the run, the first line"),
    "also where": (r"\balso where\b", "even if"),
}
TAKEN = {"told", "asked", "whole"}  # names that have meant too many things


def texts(path):
    """Yields (line, text) of the docstrings, comments, messages and help texts of a file"""
    kinds = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", None))
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in kinds:
            yield token.start[0], re.sub(r"\s+", " ", token.string)


def prose(path):
    """Yields (line, text) of a page, without its code"""
    inside = False
    for i, line in enumerate(path.read_text().splitlines(), 1):
        inside ^= line.startswith("```")
        if not inside:
            yield i, re.sub(r"`[^`]*`", "`…`", line)


@pytest.mark.parametrize("path", [*ALL, *PAGES], ids=name)
def test_words(path):
    found = [
        f"{name(path)}:{line}: {match[0].strip()!r} ({habit}: write {remedy})"
        for line, text in (texts if path.suffix == ".py" else prose)(path)
        for habit, (pattern, remedy) in WORDS.items()
        for match in re.finditer(pattern, text)
        if path.name != "test_house.py"
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", ALL, ids=name)
def test_names_that_mean_too_much(path):
    for x in ast.walk(ast.parse(path.read_text())):
        stored = isinstance(getattr(x, "ctx", None), ast.Store)
        names = {getattr(x, "id" if stored else "name", None), getattr(x, "arg", None)}
        assert not names & TAKEN, f"{name(path)}:{x.lineno}: say what {names & TAKEN} is"


def blocks(path, kind):
    """Yields (name, lines, tree) of the functions or classes of a file, decorators left out"""
    for x in ast.walk(ast.parse(path.read_text())):
        if isinstance(x, kind):
            yield x.name, x.end_lineno - x.lineno + 1, x


@pytest.mark.parametrize("path", ALL, ids=name)
def test_functions_and_classes_are_short(path):
    for kind, most, remedy in (
        (ast.FunctionDef, 60, "give a part of it a name"),
        (ast.ClassDef, 300, "move what is another subject to a class of its own"),
    ):
        for what, n, _ in blocks(path, kind):
            assert n <= most, f"{name(path)}: {what} has {n} lines, at most {most}: {remedy}"


def test_the_state_of_a_run_is_named_at_its_beginning():
    tree = next(x for what, _, x in blocks(ROOT / "training/run.py", ast.ClassDef) if what == "Run")
    born = {}  # attribute -> the first method that sets it
    for method in [x for x in tree.body if isinstance(x, ast.FunctionDef)]:
        for x in ast.walk(method):
            if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store):
                if ast.unparse(x.value) == "self":
                    born.setdefault(x.attr, method.name)
    late = {attr: method for attr, method in born.items() if method != "__init__"}
    assert not late, f"say in Run.__init__ what these are: {late}"
    many = f"Run has {len(born)} attributes, at most 22: put them where they are used"
    assert len(born) <= 22, many


LOAD = """
import sys
import dpo, sft
small = ["--steps", "2", "--eval-prompts", "4", "--batch-size", "2", "--device", "cpu"]
sft.main(small + ["--n-layer", "1", "--n-embd", "16"])
dpo.main(small)
print(*{m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)}, sep="\\n")
"""


def test_what_the_main_job_loads(tmp_path):
    """`python dpo.py` in an empty folder, with its SFT stage: what is optional stays behind its
    door, an import inside the function that asks for it."""
    command, env = [sys.executable, "-c", LOAD], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    files = [path for path in SOURCES if str(path) in done.stdout.splitlines()]
    assert ROOT / "training/run.py" in files, done.stderr
    sizes = {name(path): nodes(ast.parse(path.read_text())) for path in files}
    total, largest = sum(sizes.values()), sorted(sizes, key=sizes.get)[:-9:-1]
    words = f"{total:,} nodes are loaded, at most {LOADED:,}: import what is optional where it is"
    assert total <= LOADED, f"{words} asked for. The largest: {', '.join(largest)}"
    doors = ("hf/", "data/jsonl.py", "data/exact.py", "training/function.py", "training/loggers.py")
    doors += ("training/adamw8bit.py", "training/compiler.py", "training/lora.py")
    open_doors = [file for file in sizes if file.startswith(doors)]
    assert not open_doors, f"nobody has asked for {open_doors}"


@pytest.mark.parametrize("script", METHODS)
def test_set_up_and_loop_fit_a_screen(script):
    found = loops((ROOT / f"{script}.py").read_text())
    assert found and ("main" in found or script == "rlaif")
    for function, (setup, loop) in found.items():
        long = f"{function}: {setup} lines of set-up, at most 14, then {loop}, at most 50"
        assert setup <= 14 and loop <= 50, f"{long}: give a part of it a name"


def test_dapo_differs_from_grpo_in_what_dapo_is():
    if not shutil.which("diff"):
        pytest.skip("no diff here")
    command = ["diff", ROOT / "grpo.py", ROOT / "dapo.py"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    n = sum(line[0] in "<>" for line in said.splitlines())
    assert 0 < n <= 120, f"{n} lines differ, at most 120: write alike what is alike"


def test_readme_is_a_front_door():
    text = (ROOT / "README.md").read_text()
    others = re.sub(r"^\| `\w+\.py`.*\n", "", text, flags=re.M)  # a method's row is always welcome
    lines, size = len(others.splitlines()), len(others.encode())
    assert lines <= 158 and size <= 11_928, (
        f"without the rows of methods {lines} lines, at most 158; {size:,} bytes, at most 11,928"
    )
    fences = text.split("```")
    prose = "\n".join(fences[::2])
    for part in re.split(r"\n\n+|\n(?=- )", prose):
        if part.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\||\n", part)]
            cells = [
                re.sub(r"\]\([^)]*\)|\[", "", cell) for cell in cells
            ]  # links as they are seen
            longest = max(cells, key=len)
            assert len(longest) <= 80, f"{len(longest)} characters, at most 80: {longest}"
        n = len(part)
        assert part.startswith("|") or n <= 400, f"{n} characters, at most 400: {part}"
    for script in METHODS:
        assert re.search(rf"^\| \[?`{script}\.py`", text, re.M), f"no row of {script}.py"
    for file in re.findall(r"\b([a-z_]+(?:\.py|/))(?= {2,}|`)", text):
        assert (ROOT / file).exists() or file == "my_rewards.py", file
    loop = next(part for part in fences if part.startswith("\nfor step in run.steps"))
    assert textwrap.indent(loop.strip(), "    ") in (ROOT / "dpo.py").read_text()


def test_contributing_says_which_test_file_holds_what():
    """The first sentence of each docstring. If a file is new, this prints the whole table."""
    rows = ["| file | what it tests |", "|---|---|"]
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
        sentence = re.match(r".*?\.(?= [A-Z]|$)|.*", text)[0].rstrip(".")
        rows.append(f"| [{path.name}](tests/{path.name}) | {sentence} |")
    table = "\n".join(rows)
    found = (ROOT / "CONTRIBUTING.md").read_text()
    assert found.endswith(f"\n\n{table}\n"), f"end CONTRIBUTING.md with this table:\n{table}"


def anchors(text):
    """-> the anchors of a page's headings, as GitHub makes them"""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link
