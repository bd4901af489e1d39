"""`kdfast report RUN [RUN …]`: one page with the curves of several runs, and a picture of each panel on request.

Only files that kdfast made are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdfast.cli.errors import UserError
from kdfast.report.page import made_here, png_names, text_table, write_pngs, write_report
from kdfast.report.read_runs import RunsError, find_runs


def report(runs: Sequence[str], *, output: str, png: str | None, title: str) -> int:
    """Write the page, and pictures if requested; return the exit code."""
    page, pictures = Path(output).expanduser(), None if png is None else Path(png).expanduser()
    written = {page: "--output"} | ({pictures / name: "--png" for name in png_names()} if pictures else {})
    try:
        found = find_runs(runs)
        for path, option in written.items():
            if path.is_dir():
                raise UserError(f"{option}: {str(path)!r} is a folder; expected the name of a file")
            if path.exists() and not made_here(path):
                raise UserError(f"{option}: {str(path)!r} is not of kdfast report, and stays; name another or move it")
        for path in written:  # only after all were checked
            path.parent.mkdir(parents=True, exist_ok=True)
        write_report(page, title, found)
        print(f"{text_table(found)}\n\n{len(found)} run{'s' * (len(found) > 1)} in {page}")
        if pictures is not None:
            print(f"{len(write_pngs(pictures, found))} pictures in {pictures}")
    except RunsError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}") from error
    return 0
