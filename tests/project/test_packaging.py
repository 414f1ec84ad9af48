"""The package is what its metadata says: in a checkout, in a wheel, and beside other packages."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvpager

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ["kvpager", "kernels", "integrations"]
OPTIONAL = {
    "accelerate",
    "hypothesis",
    "matplotlib",
    "msgspec",
    "prometheus_client",
    "pytest",
    "rich",
    "sglang",
    "tqdm",
    "transformers",
    "triton",
    "typer",
    "vllm",
    "zmq",
}
BUILD_OUTPUT = {"build", "dist", "__pycache__"}
TEXT = {".c", ".cfg", ".cpp", ".cu", ".h", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yml"}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code: str, *arguments: str, cwd: Path, isolated: bool = False) -> Any:
    """Run code in a fresh interpreter and return the JSON that it prints on its last line."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, *(["-I"] if isolated else []), "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def files_of(*tops: str) -> Iterator[Path]:
    """Every file under the given folders; no build output, no hidden folder but .ci."""
    for top in tops:
        for folder, folders, files in os.walk(ROOT / top):
            folders[:] = [
                name
                for name in folders
                if name not in BUILD_OUTPUT
                and not name.endswith(".egg-info")
                and (not name.startswith(".") or name == ".ci")
            ]
            yield from (Path(folder) / name for name in sorted(files))


# --- the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["kernels", "integrations", "tests"])
def test_folder_beside_the_package_has_no_init(folder: str) -> None:
    # With one, `kernels` here would shadow the PyPI package that transformers imports.
    assert not (ROOT / folder / "__init__.py").exists()


def test_version_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    assert kvpager.__version__ == pyproject["project"]["version"]


@pytest.mark.slow
def test_transformers_runs_nothing_of_ours_as_the_kernels_package() -> None:
    pytest.importorskip("transformers")
    available, files = run_python(
        "import json, sys, transformers.integrations.hub_kernels\n"
        "from transformers.utils import is_kernels_available\n"
        "files = [getattr(module, '__file__', None) for name, module in sys.modules.items()\n"
        "         if name.partition('.')[0] == 'kernels']\n"
        "print(json.dumps([is_kernels_available(), files]))",
        cwd=ROOT,
    )
    assert [file for file in files if file and Path(file).is_relative_to(ROOT / "kernels")] == []
    if not any(package.name == "kernels" for package in importlib.metadata.distributions()):
        assert not available  # our folder alone must not pass for the package


def test_installed_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    found = run_python(
        "import json, sys\n"
        "sys.path.append(sys.argv[1])  # site-packages, too, stands behind the current folder\n"
        "import kernels\n"
        "print(json.dumps(kernels.__file__))",
        str(tmp_path),
        cwd=ROOT,
    )
    assert Path(found) == package / "__init__.py"


# --- what importing costs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kvpager", ["torch", "transformers", "triton", "numpy"]),
        ("kvpager.blocks.manager", ["torch", "transformers", "triton"]),
        ("kvpager.scheduling.scheduler", ["torch", "transformers", "triton"]),
    ],
)
def test_import_is_light(module: str, absent: list[str]) -> None:
    loaded = run_python(
        f"import json, sys, {module}\nprint(json.dumps(sorted(sys.modules)))", cwd=ROOT
    )
    assert module in loaded
    assert [name for name in absent if name in loaded] == []


# --- the public names -----------------------------------------------------------------------------


PUBLIC = [
    "BlockManager",
    "BlockStorage",
    "Engine",
    "EngineConfig",
    "KVPagerError",
    "LayerShape",
    "OutOfBlocks",
    "PagedCache",
    "Request",
    "Scheduler",
    "SequenceHandle",
    "StepPlan",
    "patch",
    "unpatch",
]


def test_all_is_exactly_the_public_names() -> None:
    assert sorted(PUBLIC) == PUBLIC == kvpager.__all__
    assert set(dir(kvpager)) == {*PUBLIC, "__version__"}


@pytest.mark.parametrize("name", kvpager.__all__)
def test_public_name_resolves(name: str) -> None:
    if name in {"Engine", "PagedCache", "patch", "unpatch"}:
        pytest.importorskip("transformers")
    assert name in dir(kvpager)
    value = getattr(kvpager, name)
    assert value.__name__ == name
    assert value.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = kvpager.no_such_name  # type: ignore[attr-defined]


@pytest.mark.slow
def test_missing_transformers_is_named_with_the_way_out() -> None:
    message = run_python(
        "import json, sys\n"
        "sys.modules['transformers'] = None  # as if it were not installed\n"
        "import kvpager\n"
        "try:\n"
        "    kvpager.patch\n"
        "except ImportError as error:\n"
        "    print(json.dumps(str(error)))",
        cwd=ROOT,
    )
    assert "pip install 'kvpager[transformers]'" in message


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution of a clean copy of the tree, as a release is."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ["pyproject.toml", "LICENSE", "README.md"]:
        shutil.copy(ROOT / name, source)
    for name in LIBRARY:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))

    def build(*command: str) -> None:
        result = subprocess.run(
            [sys.executable, *command], cwd=source, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr

    build("-c", "from setuptools import build_meta; build_meta.build_sdist('..')")
    (archive,) = work.glob("kvpager-*.tar.gz")
    build(
        *("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--quiet", "--wheel-dir", str(work), str(archive)),
    )
    (path,) = work.glob("kvpager-*.whl")
    return path


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("kvpager/")}


@pytest.mark.slow
def test_wheel_holds_every_library_file(wheel: Path) -> None:
    expected = set()
    for path in files_of(*LIBRARY):
        name = path.relative_to(ROOT).as_posix()
        expected.add(name if name.startswith("kvpager/") else f"kvpager/{name}")
    assert wheel_files(wheel) == expected


def test_wheel_carries_the_model_and_the_type_marker(wheel: Path) -> None:
    files = wheel_files(wheel)
    assert "kvpager/py.typed" in files
    assert "kvpager/testing/tiny_llama/config.json" in files
    assert "kvpager/testing/tiny_llama/model.safetensors" in files


IMPORT_EVERYTHING = """
import importlib, importlib.util, json, sys
target, optional, *modules = sys.argv[1:]
sys.path.insert(0, target)
skipped, strays = [], []
for name in modules:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        missing = (getattr(cause, "name", None) or "").partition(".")[0]
        if missing not in optional.split(",") or importlib.util.find_spec(missing) is not None:
            raise
        skipped.append(name)
    else:
        if not module.__file__.startswith(target):
            strays.append(module.__file__)
print(json.dumps({"skipped": skipped, "strays": strays}))
"""


@pytest.mark.slow
def test_installed_wheel_imports_every_module(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"),
            *("--target", str(target), str(wheel)),
        ],
        check=True,
        capture_output=True,
    )
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in wheel_files(wheel)
        if name.endswith(".py") and not name.endswith("/__main__.py")
    }
    assert {"kvpager", "kvpager.blocks.manager", "kvpager.kernels.copy_blocks"} <= modules
    result = run_python(
        IMPORT_EVERYTHING,
        str(target),
        ",".join(sorted(OPTIONAL)),
        *sorted(modules),
        cwd=tmp_path,
        isolated=True,
    )
    assert result["strays"] == []


# --- what the tree may not hold -------------------------------------------------------------------

CODE_FROM_DATA = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
NAMES = re.compile("|".join([*sorted(CODE_FROM_DATA), r"\bload\b"]))


def unsafe_loads(tree: ast.Module) -> Iterator[str]:
    """Imports and calls that could run code found in data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = [] if getattr(node.value, "value", True) is False else ["pickle.allow_pickle"]
        else:
            continue
        for name in names:
            if name.partition(".")[0] in CODE_FROM_DATA or name == "torch.load":
                yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('weights.pt')",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_load_would_be_found(code: str) -> None:
    assert NAMES.search(code)
    assert list(unsafe_loads(ast.parse(code)))


def test_no_code_from_data() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {load}"
        for path in files_of(".")
        if path.suffix == ".py"
        if NAMES.search(text := path.read_text(encoding="utf-8"))  # to parse all takes longer
        for load in unsafe_loads(ast.parse(text))
    ]
    assert found == []


MACHINE_PATH = re.compile(
    r"(?<![\w.:/~$})-])/(?:Users|farm|home|mnt|opt|root|tmp|work)/\w|\b[A-Z]:\\\\?Users"
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cd " + "/home" + "/me/model", True),
        ('"' + "/tmp" + "/x", True),
        ("docs/work/notes.md", False),
        ("https://example.org/home/index", False),
    ],
)
def test_machine_path_would_be_found(text: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is found


def test_no_machine_paths() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in files_of(".")
        if path.suffix in TEXT or path.name == "Makefile" or path.parent.name == ".ci"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []
