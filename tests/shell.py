"""Stand-ins for programs that shell scripts call."""

import stat
from pathlib import Path


def executable(path: Path, text: str) -> Path:
    """A program of that text, at that path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
