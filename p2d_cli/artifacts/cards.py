"""The card of a folder with Parquet files, the `README.md` by which `datasets` and what is built on it open the folder.

A folder with several Parquet schemas, or with JSON beside them, opens only if its card says which file is what.
Nothing in a card varies from run to run: equal results have equal cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CARD_NAME = "README.md"
_RECORD = "`manifest.json` records the inputs with their digests, every setting with its origin, and the cost.\n"


def save_card(folder: Path, front: str, text: str) -> None:
    """Write a card: YAML that hubs read, what there is to say, and where the record is."""
    (folder / CARD_NAME).write_text(f"---\n{front}---\n\n{text}\n\n{_RECORD}", encoding="utf-8")


def save_data_card(folder: Path, tables: Mapping[str, tuple[str, str]], *, title: str, text: str) -> None:
    """Write the card.

    Args:
        folder: the artifact's.
        tables: file and split of each configuration, by its name; `default` is what opens if none is asked for.
        title: its heading.
        text: what the folder holds, as Markdown.
    """
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {file}\n"
        for name, (file, split) in tables.items()
    )
    calls = "".join(
        f'{Path(file).stem} = load_dataset("PATH_OF_THIS_FOLDER", "{name}", split="{split}")\n'
        for name, (file, split) in tables.items()
    )
    front = "tags:\n- p2d\n" + (f"configs:\n{configs}" if tables else "")
    code = f"\n\n```python\nfrom datasets import load_dataset\n\n{calls}```" if tables else ""
    save_card(folder, front, f"# {title}\n\n{text}{code}")
