"""A digest of the code that a command runs, to tell whether a kept figure is older than the code.

It is that of the syntax trees, without comments, docstrings, help texts and the messages of errors;
so a better sentence makes no run old. A module counts as a whole if the command is its file. Of a
module that is imported, only the definitions count that are used, with all that they use in turn;
so a change of analysis/tables.py makes a run old only if the run's command reaches a function that
has changed. What only draws does not count: see DRAWS.
"""

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRAWS = "analysis/plots.py", "analysis/report.py"  # they draw what is kept, and change no figure
DEFINES = ast.FunctionDef, ast.ClassDef
IMPORTS = ast.Import, ast.ImportFrom
NAME_SCRIPTS = (
    ROOT,
    ROOT / "analysis",
)  # folders whose sources run scripts that they name in strings


def begins(command):
    """A command, without "python" -> where its code begins: the path of a source, and no name"""
    first, *others = command.split()
    return (others[0].replace(".", "/") + ".py" if first == "-m" else first), ""


@functools.cache
def digest(code):
    """code: pairs of the path of a source and a name in it ("": all of it) -> the digest of all
    that they use"""
    used = set()
    for path, name in code:
        use(ROOT / path, name, used)
    parts = sorted(f"{path.relative_to(ROOT)} {ast.dump(part)}\n" for path, part in used)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def use(path, name, used):
    """Adds to `used`, pairs of a path and a top-level part of that source, what the definition of a
    name needs. name "": all of the source"""
    draws = {ROOT / other for other in DRAWS} - {path}
    todo, seen = [(path, name)], set()
    while todo:
        path, name = todo.pop()
        if (path, name) in seen or path in draws:
            continue
        seen.add((path, name))
        source = read(path)
        for part in source.parts(name):
            if (path, part) not in used:
                used.add((path, part))
                todo += source.needs(part)
        if name in source.modules:
            todo.append((source.modules[name], ""))
        elif name in source.imports:
            todo.append(source.imports[name])


@functools.cache
def read(path):
    return Source(path)


class Source:
    """One of our sources: its top-level parts, and what each of them uses of other sources"""

    def __init__(self, path):
        self.path = path
        self.tree = stripped(ast.parse(path.read_text("utf-8")))
        self.modules = {}  # a name that an import binds -> the source of that module
        self.imports = {}  # a name -> (the source that defines it, its name there)
        for part in ast.walk(self.tree):
            if isinstance(part, IMPORTS):
                self.bind(part)
        self.defined = {}  # a name -> the top-level parts that define it
        self.always = []  # parts that run at an import and define nothing
        for part in self.tree.body:
            names = list(defined_by(part))
            for name in names:
                self.defined.setdefault(name, []).append(part)
            if not names and not isinstance(part, IMPORTS):
                self.always.append(part)

    def bind(self, part):
        """Notes what an import statement binds, as far as it is ours."""
        for alias in part.names:
            bound = alias.asname or alias.name.partition(".")[0]
            if isinstance(part, ast.Import):
                module = source_of(alias.name if alias.asname else bound)
                if module:
                    self.modules[bound] = module
            elif module := source_of(f"{part.module}.{alias.name}"):
                self.modules[bound] = module
            elif module := source_of(part.module):
                self.imports[bound] = module, alias.name

    def parts(self, name):
        """-> the top-level parts that define a name, and those that run at any import"""
        if name:
            return [*self.always, *self.defined.get(name, ())]
        return [part for part in self.tree.body if not isinstance(part, IMPORTS)]

    def needs(self, part):
        """Yields (source, name) of all that a part uses; name "" is a whole module."""
        taken = set()  # names of modules of which an attribute is used
        for x in ast.walk(part):
            if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name):
                if x.value.id in self.modules:
                    taken.add(x.value)
                    yield self.member(self.modules[x.value.id], x.attr)
        for x in ast.walk(part):
            if isinstance(x, ast.Name) and x not in taken:
                yield self.path, x.id
            names_script = self.path.parent in NAME_SCRIPTS and isinstance(x, ast.Constant)
            if names_script and isinstance(x.value, str):
                script = x.value.partition(" ")[0].removesuffix(".py")  # such as "dpo.py --beta 1"
                if script.isidentifier() and (ROOT / f"{script}.py").exists():
                    yield ROOT / f"{script}.py", ""

    def member(self, module, name):
        """-> what module.name is: another module of a package, or a name in its source"""
        inner = module.parent / f"{name}.py"
        package = module.name == "__init__.py"
        return (inner, "") if package and inner.exists() else (module, name)


def source_of(module):
    """-> the path of one of our modules, or None"""
    base = ROOT / (module or "").replace(".", "/")
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            return path
    return None


def defined_by(part):
    """Yields the names that a top-level part defines."""
    if isinstance(part, DEFINES):
        yield part.name
    for target in getattr(part, "targets", [getattr(part, "target", None)]):
        for x in ast.walk(target) if target else ():
            if isinstance(x, ast.Name) and isinstance(part, (ast.Assign, ast.AnnAssign)):
                yield x.id


def stripped(tree):
    """-> a syntax tree without its docstrings, the help texts of its options and the messages of
    the errors that it raises"""
    for x in ast.walk(tree):
        if isinstance(x, (ast.Module, *DEFINES)) and ast.get_docstring(x, clean=False):
            x.body = x.body[1:]
        if isinstance(x, ast.Call) and getattr(x.func, "id", "") == "opt":
            x.args = x.args[:1]
        if isinstance(x, ast.Raise) and isinstance(x.exc, ast.Call):
            x.exc.args = []
    return tree
