"""What preparation came to, as plain numbers."""

from __future__ import annotations

from typing import Any

from llm.data.examples import ExampleRows
from llm.data.prepare import Rows


def text_report(rows: Rows | ExampleRows) -> dict[str, Any]:
    """Of a source's text, before it is laid out."""
    meta = rows.tokens_cache.meta
    kept = {
        name: meta[name] for name in ("documents", "empty", "tokens", "bytes")
    }  # of examples, those left out are the empty ones
    if isinstance(rows, ExampleRows):
        return kept | {"skipped": meta["skipped"]}
    return kept | {"bytes_per_token": round(meta["bytes"] / max(1, meta["tokens"]), 4)}


def rows_report(rows: Rows | ExampleRows) -> dict[str, Any]:
    """Of what a task makes of it."""
    meta = rows.rows_cache.meta
    kept = {name: meta[name] for name in ("documents", "inputs", "rows", "cut")}
    kept |= {"pairs": meta["pairs"]} if meta["pairs"] else {}
    return kept | {name: round(meta[name], 6) for name in ("fill", "target_fill") if name in meta}
