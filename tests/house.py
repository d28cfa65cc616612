"""How heavy the house is, in numbers: python tests/house.py [folder of a checkout]

Nodes are expressions and statements of Python's ast; code lines are those that are neither empty
nor all comment or docstring. Set-up is what stands in `main` before its outermost loop.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def methods(root):
    """-> the names of the scripts that train: each has the defaults of some tasks"""
    return [p.stem for p in sorted(root.glob("*.py")) if "\nPRESETS = " in p.read_text()]


METHODS = methods(ROOT)


def nodes(tree):
    return sum(isinstance(x, (ast.expr, ast.stmt)) for x in ast.walk(tree))


def code_lines(text):
    """-> the lines of a source that hold code"""
    tree, lines = ast.parse(text), text.splitlines()
    kept = {i for i, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
    for x in ast.walk(tree):
        if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant):
            kept -= set(range(x.lineno, x.end_lineno + 1))
    return len(kept)


def loops(text):
    """-> {function: (lines of set-up, lines of its loop)} of main and of every function that runs a
    training loop"""
    found, lines = {}, text.splitlines()

    def filled(start, stop):
        return sum(bool(line.strip()) for line in lines[start - 1 : stop])

    for f in [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef)]:
        steps = [x for x in f.body if isinstance(x, ast.For) and ".steps(" in ast.unparse(x.iter)]
        for loop in steps:
            setup = filled(f.body[0].lineno, loop.lineno - 1)
            found[f.name] = setup, filled(loop.lineno, loop.end_lineno)
    return found


def defined(paths):
    """-> the names that other files define: functions, classes, attributes and fields"""
    names = set()
    for path in paths:
        for x in ast.walk(ast.parse(path.read_text())):
            if isinstance(x, (ast.FunctionDef, ast.ClassDef)):
                names.add(x.name)
            elif isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store):
                names.add(x.attr)
            elif isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name):
                names.add(x.target.id)
    return names


def foreign(text, others):
    """-> the names from other files that main and the loops use"""
    tree, used = ast.parse(text), set()
    imported = [
        a.asname or a.name for x in tree.body if isinstance(x, ast.ImportFrom) for a in x.names
    ]
    functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    for f in [x for x in functions if x.name in loops(text) or x.name == "main"]:
        for x in ast.walk(f):
            name = (
                x.attr if isinstance(x, ast.Attribute) else x.id if isinstance(x, ast.Name) else ""
            )
            options = isinstance(x, ast.Attribute) and ast.unparse(x.value) == "o"
            if (
                name in others
                and (isinstance(x, ast.Attribute) or name in imported)
                and not options
            ):
                used.add(name)
    return used


def main(root):
    sources = [p for p in sorted(root.rglob("*.py")) if ".venv" not in p.parts]
    tests = [p for p in sources if "tests" in p.parts]
    sources = [p for p in sources if p not in tests]
    shared = [p for p in sources if p.stem not in methods(root)]
    others = defined(shared)
    print(f"{'':<22}{'lines':>6}{'nodes':>7}{'a line':>7}{'names':>6}  set-up : loop")
    for name in methods(root):
        text = (root / f"{name}.py").read_text()
        n, code = nodes(ast.parse(text)), code_lines(text)
        shape = ", ".join(f"{a} : {b}" for a, b in loops(text).values())
        names, lines = len(foreign(text, others)), len(text.splitlines())
        print(f"{name + '.py':<22}{lines:>6}{n:>7}{n / code:>7.1f}{names:>6}  {shape}")
    for what, paths in (("without tests", sources), ("tests", tests)):
        texts = [p.read_text() for p in paths]
        n, code = sum(nodes(ast.parse(t)) for t in texts), sum(map(code_lines, texts))
        wide = sum(len(line) > 100 for t in texts for line in t.splitlines())
        lines = sum(len(t.splitlines()) for t in texts)
        print(f"{what:<22}{lines:>6}{n:>7}{n / code:>7.1f}{'':>6}  {wide} lines above 100 columns")
    templates = [p.read_text() for p in (root / "analysis").glob("*.jinja")]
    print(f"{'templates':<22}{sum(len(t.splitlines()) for t in templates):>6}")
    readme = (root / "README.md").read_text()
    prose = [line for line in readme.splitlines() if not line.startswith("|")]
    size = f"{len(readme.splitlines())} lines, {len(readme.encode()):,} bytes"
    print(f"README.md: {size}, longest paragraph {max(map(len, prose))} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT))
