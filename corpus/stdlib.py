"""The embedded corpus: documents, chats and preferences from the Python that runs this."""

import ast
import sysconfig
from functools import lru_cache
from pathlib import Path

from support.files import UserError

# not library text: tests, vendored wheels, character tables, and the topics (they are "reference")
STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled",
                "encodings", "pydoc_data", "__pycache__"}


def stdlib_documents(source):
    """The documents of one embedded source, from the Python that runs this: no network."""
    if source == "reference":
        from pydoc_data.topics import topics
        for topic, text in sorted(topics.items()):
            yield stdlib_document(source, topic, text, topic, f"pydoc_data/topics.py:{topic}")
    elif source == "docstrings":
        for module, file, _, docstrings in stdlib_modules():
            for line, heading, docstring in docstrings:
                yield stdlib_document(source, f"{heading.split('(')[0].split()[-1]}@{line}",
                                      f"{heading}\n\n{docstring}\n", module, f"{file}:{line}")
    elif source == "code":
        for module, file, text, _ in stdlib_modules():
            yield stdlib_document(source, module, text, module, f"{file}:1")
    else:
        raise UserError(f"sources: stdlib has reference, docstrings and code, not {source}")


def stdlib_document(source, name, text, group, provenance):
    return {"id": f"{source}/{name}", "text": text, "source": source,
            "metadata": {"split_group": group, "provenance": provenance}}


@lru_cache(maxsize=1)
def stdlib_modules():
    """[(module, file, text, [(line, heading, docstring)])] of the running interpreter's library."""
    root, modules = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if STDLIB_SKIPS & set(file.parts) or file.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(text)
        except SyntaxError:  # the library keeps a few files broken on purpose
            continue
        modules.append((module, file.as_posix(), text, list(docstrings_of(tree, module))))
    return modules


def docstrings_of(node, name):
    """(line, heading, docstring) of a module, its classes and functions, and theirs."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield getattr(node, "lineno", 1), heading_of(node, name), docstring
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from docstrings_of(child, f"{name}.{child.name}")


def heading_of(node, name):
    """The line above a docstring, as pydoc would print it: `module.function(arguments)`."""
    if isinstance(node, ast.Module):
        return f"module {name}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"
