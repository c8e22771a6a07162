"""What a comparison found, for people: a self-contained HTML page, and a table for the terminal."""

from __future__ import annotations

from smidgen.report.page import write_page
from smidgen.report.table import print_table

__all__ = ["print_table", "write_page"]
