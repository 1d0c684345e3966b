"""The embedded corpus: documents from the library of the Python that runs this, without a network.

It has three sources, as a small Dolma: "reference" (the topics of help()), "docstrings" and "code".
"""

import ast
import os
import sysconfig
from functools import lru_cache
from pathlib import Path

from support.bars import bar
from support.files import UserError

# Not library text: tests, vendored packages, tables of characters, and pydoc_data, whose topics are
# the source "reference".
STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled",
                "encodings", "pydoc_data", "__pycache__"}


def stdlib_documents(source):
    """Yield the documents of "reference", "docstrings" or "code"."""
    if source == "reference":
        from pydoc_data.topics import topics  # only here: half a megabyte
        for topic, text in sorted(topics.items()):
            place = f"pydoc_data/topics.py:{topic}"
            yield stdlib_document(source, topic, text, topic, place)
    elif source == "docstrings":
        for module, file, _, docstrings in stdlib_modules():
            for line, heading, docstring in docstrings:
                name = heading.split("(")[0].split()[-1]
                text = f"{heading}\n\n{docstring}\n"
                yield stdlib_document(source, f"{name}@{line}", text, module, f"{file}:{line}")
    elif source == "code":
        for module, file, text, _ in stdlib_modules():
            yield stdlib_document(source, module, text, module, f"{file}:1")
    else:
        raise UserError(f"sources: {source}: stdlib has reference, docstrings and code; use one of "
                        "these names, or give the source a path")


def stdlib_document(source, name, text, group, provenance):
    """A document; those of one group (module or topic) are held out together or not at all."""
    return {"id": f"{source}/{name}", "text": text, "source": source,
            "metadata": {"split_group": group, "provenance": provenance}}


@lru_cache(maxsize=1)  # two sources and the leaked docstrings read it; parsing takes seconds
def stdlib_modules():
    """[(module, file, text, [(line, heading, docstring)])] of the library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in bar(library_files(root), "reading Python's library", unit="files"):
        file = path.relative_to(root)
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a few files of the library are broken on purpose
            continue
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        docstrings = list(docstrings_of(tree, module))
        modules.append((module, file.as_posix(), text, docstrings))
    return modules


def library_files(root):
    """The files of modules in a folder, sorted; those of installed packages are not looked at."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - STDLIB_SKIPS  # where os.walk goes next
        files += [Path(folder, name) for name in names
                  if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    return sorted(files)


def docstrings_of(node, name):
    """Yield (line, heading, docstring) of a module, and of the classes and functions in it."""
    docstring = ast.get_docstring(node)
    if docstring:
        line = getattr(node, "lineno", 1)  # a module has none
        yield line, heading_of(node, name), docstring
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
