"""Hashes of the project's own code: what tells whether it has changed."""

import hashlib

from configs import ROOT
from support.files import file_sha256

MAIN_FILES = ("model.py", "data.py", "train.py", "eval.py", "adapt.py", "configs/__init__.py")
PARTS = ("corpus", "scaling", "support")  # folders of code


def code_version():
    """One hash over the project's code, which must be the same on every rank.

    A user's config files are no part of it, wherever they lie: what they say is in the settings.
    """
    files = [ROOT / name for name in MAIN_FILES]
    for folder in PARTS:
        files += sorted((ROOT / folder).glob("*.py"))
    digests = "".join(file_sha256(file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def main_files():
    """{name: hash} of the files that readers change."""
    return {name: file_sha256(ROOT / name)[:12] for name in MAIN_FILES}
