"""The default corpus: the documentation that ships inside the Python interpreter."""

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from hdlm_jax.errors import UserError

# Left out: tests, whole programs, and packages that not every distribution of Python ships.
EXCLUDED = frozenset(
    ["test", "tests", "idlelib", "tkinter", "lib2to3", "distutils", "turtledemo", "ensurepip"] + ["site-packages"]
)


def python_docs(root: Path | None = None) -> dict[str, str]:
    """The documentation that ships inside the Python interpreter, by name of the document.

    A module of the standard library is one document: its docstrings in the order of the source,
    read with `ast` (no module is imported or run). Each help topic of `pydoc_data` is another.
    About 520 documents and 1.9 MB of English and code, in the order of their names; the same on
    every machine with the same Python version.

    Args:
      root: folder of the library's sources; the running interpreter's own by default.

    Raises:
      UserError: the interpreter came without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or EXCLUDED.intersection(parts):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        tree = _parse(path)
        if name == "pydoc_data.topics":
            documents.update((f"topics.{topic}", text) for topic, text in _literal(tree, "topics").items())
        elif text := "\n\n".join(docstrings(tree)):
            documents[name] = text
    if not documents:
        raise UserError(f"data.source: got 'python_docs', but {root} holds no library sources; use 'text'")
    return dict(sorted(documents.items()))


def docstrings(tree: ast.Module) -> list[str]:
    """All docstrings of a module, indentation removed, in the order of the source.

    >>> docstrings(ast.parse("'A module.'\\ndef f():\\n    '''Does it.'''\\nclass C:\\n    'One.'"))
    ['A module.', 'Does it.', 'One.']
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in _statements(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The node and every statement inside it, in the order of the source."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(child)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
        return ast.parse(path.read_bytes(), filename=str(path))


def _literal(tree: ast.Module, name: str) -> dict[str, str]:
    """The value of the module-level assignment `name = {...}`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return {}
