"""The house stands: import floors, what the package may import, sizes, docstrings, requirements."""

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hdlm_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}

# The floors from the ground up: a unit (a file or folder of the package) imports itself and units on floors
# below its own. `data` stands apart: it imports the ground only, and what may import it is listed beside it.
FLOORS = [
    {"errors"},
    {"files"},
    {"config"},
    {"diffusion"},
    {"models"},
    {"generation"},
    {"evaluation"},
    {"training"},
    {"interop", "visual", "planning"},
    {"lm"},
    {"benchmarks"},
    {"verbs"},
    {"__main__"},
]
HEIGHT = {unit: height for height, units in enumerate(FLOORS) for unit in units}
DATA_MAY_IMPORT = {"data", "errors", "files", "config"}
DATA_IS_FOR = {unit for unit, height in HEIGHT.items() if height >= HEIGHT["generation"]}
FORBIDDEN = {"tensorflow", "torch", "transformers"}
# First line of a file under interop that is copied out to run without this package, and so may import torch.
EXPORTED_MARK = "# Exported modeling file"
LAZY = [
    "grain",
    "orbax",
    "sentencepiece",
    "tensorflow_datasets",
    "matplotlib",
    "tensorboardX",
    "safetensors",
    "tokenizers",
    "fsspec",
    "gcsfs",
    *sorted(FORBIDDEN),
]
MAX_LINES = 420
# Distributions whose import name is another one.
IMPORT_NAMES = {"absl-py": "absl", "orbax-checkpoint": "orbax", "pyyaml": "yaml"}
# Who touches files other than through hdlm_jax/files.py, and why that is none of a run, a checkpoint or prepared data.
# What they are given is a path of this machine.
TOUCH_FILES = {
    "files": "the module itself",
    "config": "experiments, which are Python files",
    "lm": "whether a text is the name of a file",
    "data.corpora": "the user's own texts",
    "data.python_docs": "the interpreter's own sources",
    "data.byte_bpe": "the user's own vocabularies",
    "interop": "exported and imported folders",
    "visual": "pictures and pages",
    "verbs.export": "lists the exported folder",
    "benchmarks.kill": "looks at runs of its own from outside while they write",
    "planning.program": "what the compiler dumps into a temporary folder",
    "training.profiler": "the map of this process",
    "training.lease": "the number of this boot",
    "training.run_folder": "the lock, which on a disk is an open file",
}
FILE_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "open", "mkdir", "touch", "unlink", "rmdir"}
FILE_METHODS |= {"rename", "iterdir", "glob", "rglob", "exists", "is_file", "is_dir", "stat"}
FILE_FUNCTIONS = {"open", "os.replace", "os.rename", "os.remove", "os.makedirs", "os.path.isfile", "os.path.exists"}
FILE_FUNCTIONS |= {"shutil.rmtree", "shutil.copy", "shutil.copyfile", "shutil.copytree", "shutil.move"}
# Methods whose meaning a base class fixes (Flax modules, grain transforms).
HOOKS = {"setup", "map"}


def unit_of(module: str) -> str:
    """`hdlm_jax.data.corpora` -> `data`; the package itself -> `__init__`."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_modules(node: ast.stmt, module: str) -> list[str]:
    """What one import statement of `module` names, absolute; `from hdlm_jax import x` is hdlm_jax.x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        above = module.split(".")[: -node.level]
        base = ".".join([*above, base] if base else above)
    return [f"{base}.{alias.name}" for alias in node.names] if base == "hdlm_jax" else [base]


def imports(tree: ast.AST, module: str, in_repr: bool = False) -> Iterator[tuple[int, str, bool]]:
    """Yields (line, imported module, whether inside a `_repr_*_` method) for every import below `tree`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name, in_repr) for name in imported_modules(node, module))
        is_function = isinstance(node, ast.FunctionDef)
        is_repr = is_function and node.name.startswith("_repr_") and node.name.endswith("_")
        yield from imports(node, module, in_repr or is_repr)


def may_import(unit: str, other: str) -> bool:
    """Whether a file of `unit` may import `other`."""
    if unit == "data":
        return other in DATA_MAY_IMPORT
    if other == "data":
        return unit in DATA_IS_FOR
    return unit == other or HEIGHT.get(other, len(FLOORS)) < HEIGHT.get(unit, 0)


def floor_breaches(source: str, module: str) -> list[str]:
    """The imports of one file that go up or across a floor."""
    unit, breaches = unit_of(module), []
    for line, name, in_repr in imports(ast.parse(source), module):
        if name.split(".")[0] != "hdlm_jax" or name == "hdlm_jax.__version__":
            continue
        other = unit_of(name)
        if not (may_import(unit, other) or (in_repr and other == "visual")):
            breaches.append(f"{module}:{line}: {unit} imports {other}")
    return breaches


def foreign_imports(source: str, module: str) -> set[str]:
    """The top-level names of other distributions that one file imports anywhere."""
    names = {name.split(".")[0] for _, name, _ in imports(ast.parse(source), module)}
    return names - sys.stdlib_module_names - {"hdlm_jax"}


def file_accesses(source: str) -> list[str]:
    """The calls of one file that look at, read or write files, as 'line: name'."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        method = isinstance(node.func, ast.Attribute) and node.func.attr in FILE_METHODS
        if name in FILE_FUNCTIONS or (method and not name.startswith("files.")):
            found.append(f"{node.lineno}: {name}")
    return found


def undocumented(source: str) -> list[str]:
    """The public functions, classes and methods of one file that have no docstring."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

    def walk(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, kinds) and not child.name.startswith("_") and child.name not in HOOKS:
                if ast.get_docstring(child) is None:
                    yield f"{prefix}{child.name}"
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{prefix}{child.name}.")

    return list(walk(ast.parse(source), ""))


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirement_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


# ---- the checks catch what they are for


@pytest.mark.parametrize(
    ("module", "statement", "allowed"),
    [
        ("hdlm_jax.diffusion.noising", "from hdlm_jax.errors import require", True),
        ("hdlm_jax.diffusion.noising", "from hdlm_jax.diffusion import losses", True),
        ("hdlm_jax.diffusion.noising", "from . import losses", True),
        ("hdlm_jax.diffusion.noising", "from ..models import transformer", False),
        ("hdlm_jax.diffusion.__init__", "from . import losses", True),
        ("hdlm_jax.diffusion.__init__", "from .. import training", False),
        ("hdlm_jax.diffusion.noising", "import hdlm_jax.models.transformer", False),
        ("hdlm_jax.diffusion.noising", "from hdlm_jax import models", False),
        ("hdlm_jax.errors", "from hdlm_jax import config", False),
        ("hdlm_jax.models.transformer", "from hdlm_jax.data import pipeline", False),
        ("hdlm_jax.data.pipeline", "from hdlm_jax.models import transformer", False),
        ("hdlm_jax.data.pipeline", "from hdlm_jax.diffusion import noising", False),
        ("hdlm_jax.data.pipeline", "from hdlm_jax.config import validate", True),
        ("hdlm_jax.generation.loop", "from hdlm_jax.data import tokenizers", True),
        ("hdlm_jax.training.train", "def f():\n    from hdlm_jax.lm import load", False),
        ("hdlm_jax.training.train", "if TYPE_CHECKING:\n    from hdlm_jax.lm import load", False),
        ("hdlm_jax.visual.figures", "from hdlm_jax.interop import published", False),
        ("hdlm_jax.diffusion.x", "def _repr_html_(self):\n from hdlm_jax.visual import figures", True),
        ("hdlm_jax.diffusion.x", "def _repr_html_(self):\n from hdlm_jax.lm import load", False),
        ("hdlm_jax.diffusion.x", "from hdlm_jax.visual import figures", False),
        ("hdlm_jax.benchmarks", "from hdlm_jax.verbs import train", False),
        ("hdlm_jax.verbs.train", "import hdlm_jax", False),
        ("hdlm_jax.training.train", "from hdlm_jax import load", False),
        ("hdlm_jax.training.train", "from hdlm_jax import __version__", True),
        ("hdlm_jax.__main__", "from hdlm_jax.verbs import train", True),
    ],
)
def test_the_floor_check_tells_good_from_bad(module: str, statement: str, allowed: bool):
    assert (floor_breaches(statement, module) == []) == allowed


def test_the_docstring_check_finds_what_is_missing():
    source = 'def f():\n "doc"\ndef g(): pass\ndef _h(): pass\nclass A:\n "doc"\n def m(self): pass\n'
    assert undocumented(source) == ["g", "A.m"]


def test_the_file_check_tells_good_from_bad():
    bad = "open(x)\n(folder / 'x').write_text('')\nshutil.rmtree(x)\nos.replace(a, b)\nPath(x).exists()\n"
    assert [line.split(":")[0] for line in file_accesses(bad)] == ["1", "2", "3", "4", "5"]
    assert file_accesses("files.read_text(x)\nfiles.write_whole(x, '')\ntext.replace('a', 'b')\n") == []


# ---- the package


def test_every_unit_has_a_floor():
    units = {unit_of(module) for module in MODULES} - {"__init__", "data"}
    assert units <= set(HEIGHT)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "hdlm_jax.__init__"])
def test_imports_keep_the_floors(module: str):
    assert floor_breaches(MODULES[module].read_text(encoding="utf-8"), module) == []


def test_every_folder_with_sources_is_a_package():
    missing = {path.parent for path in SOURCES if not (path.parent / "__init__.py").exists()}
    assert missing == set()


def test_files_of_runs_are_reached_through_one_module():
    """So that a run, its checkpoints and prepared data may lie in a bucket."""
    found = {name: file_accesses(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    short = {name.removeprefix("hdlm_jax.").removesuffix(".__init__"): calls for name, calls in found.items() if calls}
    known = lambda name: name in TOUCH_FILES or name.split(".")[0] in TOUCH_FILES
    assert {name: calls for name, calls in short.items() if not known(name)} == {}
    used = {name for name in TOUCH_FILES if any(n == name or n.split(".")[0] == name for n in short)}
    assert set(TOUCH_FILES) == used  # no exception without a need


def test_neither_tensorflow_nor_torch_is_imported():
    def is_exported(path: Path, text: str) -> bool:
        return path.parent == PACKAGE / "interop" and text.startswith(EXPORTED_MARK)

    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    found = {path: foreign_imports(text, "hdlm_jax.x") & FORBIDDEN for path, text in texts.items()}
    assert {path for path, names in found.items() if names and not is_exported(path, texts[path])} == set()


@pytest.mark.parametrize("unit", ["errors", "config", "diffusion"])
def test_the_mathematics_needs_only_jax_and_numpy(unit: str):
    allowed = {"jax", "numpy"} if unit == "diffusion" else {"ml_collections"}
    modules = {name: path for name, path in MODULES.items() if unit_of(name) == unit}
    used = {name: foreign_imports(path.read_text(encoding="utf-8"), name) for name, path in modules.items()}
    assert {name: names - allowed for name, names in used.items() if names - allowed} == {}


def test_importing_the_package_loads_no_data_checkpoint_or_drawing_library():
    """Nor do the maths, the model and generation, which need only jax, flax, optax and ml-collections."""
    units = [name for name in MODULES if unit_of(name) in {"diffusion", "models", "generation"}]
    names = ["hdlm_jax", *(name.removesuffix(".__init__") for name in units)]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {LAZY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_no_source_file_is_too_long():
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_everything_public_has_a_docstring():
    missing = {name: undocumented(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert {name: names for name, names in missing.items() if names} == {}


# ---- the project around it


def test_requirements_and_setup_list_the_same():
    listed = requirement_lines((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert listed == requirement_lines(setup_cfg()["options"]["install_requires"])


def test_what_the_package_imports_is_required():
    """Every distribution imported by name is among install_requires, not left to come with another one."""
    required = requirement_lines(setup_cfg()["options"]["install_requires"])
    names = {line.split(">=")[0] for line in required}
    provided = {IMPORT_NAMES.get(name, name).replace("-", "_") for name in names}
    used = {name: foreign_imports(path.read_text(encoding="utf-8"), name) for name, path in MODULES.items()}
    optional = FORBIDDEN | {"flatbuffers", "tokenizers", "libtpu", "fsspec", "gcsfs"}
    extra = {name: names - provided - optional for name, names in used.items()}
    assert {name: names for name, names in extra.items() if names} == {}
