"""Finds the publisher's files in a benchmark's folder, or says where to get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm_safeguard.data.prompts import Label, Prompt
from vlm_safeguard.errors import DataError

Picture = tuple[tuple[str, str], ...]

# Some publishers converted their pictures and left the old names in their tables.
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Folder:
    """Where the user keeps the files of the benchmark ``name``, and who publishes them."""

    name: str
    path: Path
    publisher: str

    def find(self, *names: str, inside: str = "") -> Path:
        """The first of ``names`` (files or folders), at the top or where a clone has them.

        Args:
            names: accepted names, the preferred one first.
            inside: the folder of the publisher's repository in which the file lies.

        Raises:
            DataError: none of them is there; says which file is wanted and who publishes it.
        """
        for name in names:
            for place in (self.path, self.path / inside):
                if (place / name).exists():
                    return place / name
        where = f"{self.path} (nor in its {inside})" if inside else str(self.path)
        raise DataError(
            f"{self.name}: {' or '.join(names)} is not in {where}; get it from {self.publisher}"
        )

    def picture(self, folder: Path, name: str) -> Picture:
        """``Prompt.picture`` for the image file ``name`` in ``folder``. It is not opened.

        Raises:
            DataError: there is no such file, or the name leads out of the folder.
        """
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{self.name}: the picture {name} lies outside {folder}; correct it")
        for candidate in (path, *(path.with_suffix(suffix) for suffix in _SUFFIXES)):
            if candidate.is_file():
                return (("kind", "file"), ("value", str(candidate)))
        raise DataError(f"{self.name}: the picture {path} is missing; get it from {self.publisher}")

    def prompt(
        self,
        key: str,
        text: str,
        *,
        label: Label = "harmful",
        intent: str = "",
        cluster: str = "",
        picture: Picture | None = None,
    ) -> Prompt:
        """A prompt of this benchmark: its id is ``name-key``, its cluster its own by default."""
        return Prompt(
            id=f"{self.name}-{key}",
            prompt=text,
            label=label,
            form="picture" if picture else "plain",
            intent=intent,
            cluster=f"{self.name}-{cluster or key}",
            picture=picture,
        )
