"""The package that `pip install .` installs, and that pyproject.toml, CITATION.cff and CHANGELOG.md
name the same version."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from house import METHODS

FOLDERS = ("analysis", "data", "hf", "training")


def project():
    """-> {(table, key): its text in pyproject.toml}; Python 3.10 has no reader of TOML"""
    found, table = {}, ""
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if line.startswith("["):
            table = line[1 : line.index("]")]
        elif " = " in line:
            key, _, value = line.partition(" = ")
            found[table, key] = value
    return found


def test_one_version_in_all_papers():
    version = project()["project", "version"].strip('"')
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert newest == version, "CHANGELOG.md begins with the version of pyproject.toml"


def test_the_packages_are_all_of_ours():
    listed = set(re.findall(r'"([\w.]+)"', project()["tool.setuptools", "packages"]))
    ours = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    ours = {".".join(path.relative_to(ROOT).parts) for path in ours}
    assert listed == ours, "pyproject.toml lists the packages that pip installs"


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_beside_the_sources_are_installed(folder):
    patterns = project().get(("tool.setuptools.package-data", folder), "")
    kept = re.findall(r'"(\*\.\w+)"', patterns)
    for path in (ROOT / folder).rglob("*"):
        code = path.is_dir() or path.suffix in (".py", ".pyc") or path.name[0] == "."
        assert code or any(path.match(pattern) for pattern in kept), (
            f"give {path.relative_to(ROOT)} a pattern in package-data of pyproject.toml"
        )


def test_pip_reads_what_the_requirements_say():
    """The requirements files are the only list of packages; pyproject.toml names them."""
    found = project()
    for key, file in (
        ("dependencies", "requirements.txt"),
        ("optional-dependencies.hf", "requirements-hf.txt"),
        ("optional-dependencies.gpu", "requirements-gpu.txt"),
    ):
        assert f'"{file}"' in found["tool.setuptools.dynamic", key]
        packages = [x for x in (ROOT / file).read_text().splitlines() if x and x[0] != "#"]
        assert packages and not any(x[0] == "-" for x in packages), "pip's own flags are not read"
    least = re.search(r"\d\.\d+", found["project", "requires-python"])[0]
    assert f"py{least.replace('.', '')}" in found["tool.ruff", "target-version"]


@pytest.mark.slow
def test_an_installed_copy_runs_from_anywhere(tmp_path):
    """Builds a wheel and installs it without its dependencies, which these tests have already."""
    copy, site = tmp_path / "copy", tmp_path / "site"
    ignored = shutil.ignore_patterns(".*", "out", "__pycache__", "build", "docs", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, copy]
    done = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def python(*words):
        env = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    [papers] = site.glob("nanopo-*.dist-info")
    assert "Requires-Python: >=3.10" in (papers / "METADATA").read_text()
    scripts = [*METHODS, "gpt", "packing", "gpu", "head", "chat", "evaluate", "export"]
    files = "*(sys.modules[name].__file__ for name in sys.argv[1:])"
    code = f"import sys; [__import__(name) for name in sys.argv[1:]]; print({files}, sep='\\n')"
    found = python("-c", code, *scripts).splitlines()
    assert found == [str(site / f"{name}.py") for name in scripts]
    assert "--seeds" in python("-m", "compare", "--help")
    small = "--steps 2 --eval-prompts 4 --batch-size 2 --max-new-tokens 4 --device cpu".split()
    python("-m", "sft", *small, "--n-layer", "1", "--n-embd", "16")
    assert "checkpoint out/reviews/dpo.pt" in python("-m", "dpo", *small)
