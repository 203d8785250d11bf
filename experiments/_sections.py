"""The parts of a report: a heading, a table, pictures, lines of text."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments._tables import Column, markdown_table


class Section(NamedTuple):
    """A heading with a table, pictures as ``(file, what it shows)``, and lines of text.

    Without rows there is no table.
    """

    title: str
    rows: Sequence[dict[str, Any]]
    columns: Sequence[Column]
    figures: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The report's text."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        if section.rows:
            parts.append(markdown_table(section.rows, section.columns))
        parts += section.notes
        parts += [f"![{caption}]({file})" for file, caption in section.figures]
    return "\n\n".join(parts) + "\n"


def draw(
    out: pathlib.Path,
    name: str,
    plot: Callable[..., pathlib.Path],
    data: dict[str, Any],
    **options: Any,
) -> list[tuple[str, str]]:
    """Draws into ``figures/``; returns the link and a caption for the Markdown."""
    if not next(iter(data.values()), None):
        return []
    path = plot(data, out / "figures" / name, **options)
    return [(str(path.relative_to(out)), path.stem.replace("_", " "))]
