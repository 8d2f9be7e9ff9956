"""A page of sections, as one HTML file with everything inside, or as Markdown with its pictures beside it."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

PAGE = Path(__file__).parent / "page.html.jinja"


@dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG picture."""

    name: str
    caption: str
    png: bytes = field(repr=False)


Block = str | Table | Picture


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def to_html(title: str, sections: Sequence[Section], marks: Mapping[str, str]) -> str:
    """Write one HTML page with everything inside; cells that hold a word of `marks` get that class."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))

    def kind(block: Block) -> str:
        return type(block).__name__

    def inline(picture: Picture) -> str:
        return base64.b64encode(picture.png).decode()

    return template.render(title=title, sections=sections, kind=kind, inline=inline, marks=marks)


def to_markdown(title: str, sections: Sequence[Section], folder: Path) -> str:
    """Write the same as Markdown, with pictures as files in `folder`."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += [f"**{block.caption}**", ""] if block.caption else []
                lines += [_line(block.head), _line(["---"] * len(block.head)), *map(_line, block.rows), ""]
            elif isinstance(block, Picture):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{block.name}.png").write_bytes(block.png)
                lines += [f"![{block.caption}]({folder.name}/{block.name}.png)", "", block.caption, ""]
            else:
                lines += [block, ""]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
