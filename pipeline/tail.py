"""Files of JSON lines that somebody else is writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Tail:
    """The rows that a growing file of JSON lines got since the last look.

    Args:
        appended: whoever goes on after a kill writes behind what is there, so a line may be no row. Otherwise that
            one cuts the file first, so such a line is a piece of one that was read too early.
    """

    def __init__(self, path: Path, appended: bool = False) -> None:
        self.path, self.appended = path, appended
        self.num_bytes_read = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Whole lines only; a file that was cut is read again from its beginning."""
        if not self.path.exists():
            return []
        if self.path.stat().st_size < self.num_bytes_read:
            self.num_bytes_read = 0
        with self.path.open("rb") as file:
            file.seek(self.num_bytes_read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        rows = []
        for line in whole.splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                if not self.appended:  # cut, and grown past where we were
                    self.num_bytes_read = 0
                    return []
        self.num_bytes_read += len(whole)
        return rows
