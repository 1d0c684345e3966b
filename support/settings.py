"""The settings of a run, as they are printed: all at its first start, later what has changed."""

import textwrap
from pathlib import Path

from support.files import read_json

# The first key of each schema: the settings of a run are those of several, one after the other.
GROUPS = {"d_model": "network", "data_dir": "data", "suite": "evaluation", "run_dir": "training",
          "method": "tuning"}


def print_settings(config, settings):
    """Print {key: value} of a run that begins, or what differs where the run has begun before.

    config: its TrainConfig.
    """
    saved = Path(config.run_dir) / "config.json"
    before = read_json(saved) if saved.is_file() and not config.overwrite else {}
    if "run_dir" not in before:  # no run of ours is there yet
        print(f"config: all settings, which {saved} keeps")
        for name, values in grouped(settings).items():
            line = f"{name}: {', '.join(values)}"
            print(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    ",
                                break_on_hyphens=False))
        return
    changes = []
    for key, value in settings.items():
        if key in before and before[key] != value:
            changes.append(f"{key}={shown(value)} (before: {shown(before[key])})")
    changed = f", except {', '.join(changes)}" if changes else ""
    print(f"config: as in {saved}{changed}")


def grouped(settings):
    """{group: ["key=value", ...]} of settings."""
    groups = {}
    name = "run"
    for key, value in settings.items():
        name = GROUPS.get(key, name)
        groups.setdefault(name, []).append(f"{key}={shown(value)}")
    return groups


def shown(value):
    """A value as text; in quotes if a reader would not see it, or not where it begins or ends."""
    text = str(value)
    is_unclear = not text or text != text.strip()
    return repr(value) if is_unclear else text
