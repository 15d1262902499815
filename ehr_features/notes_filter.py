"""The leak filter: takes terms of the 14 findings and of radiology out of a text.

Comes in: texts. Goes out: the texts without the terms of leak_terms.csv, and how many there were. What goes depends on
the text alone: no label, no other text, no fitted list. `standard` takes out what names a finding or speaks of imaging;
`aggressive` also organs, diseases and procedures that come close.

A term goes with the words that only make sense beside it (`acute`, `bilateral`, `organism unspecified`); of a sentence
whose label says that it lists diagnoses, the whole item between semicolons goes. What is left is made to read: no empty
item, label or sentence. Text without a term is left as it is, to the byte, and numbers are never touched: nothing is
split into sentences. Filtering twice is filtering once.

Differs from the published filter: that one dropped sentences (split at every full stop, so at decimals too) that named
one of the film's own findings, so that a gap in the note told the label.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

SHIPPED = Path(__file__).with_name("leak_terms.csv")
GAP = "\ue000"  # stands where a term stood while the rest is mended; a private-use character
JOINTS = "and/or|and|or|with|without|w/|w/o|for|of|due to|secondary to|from|versus|vs"

# applied in this order, over and over, until nothing changes; only beside gaps
MEND = (
    (rf"(?i){GAP}(?:[ \t]*[,;/&+\-]?[ \t]*|[ \t]+(?:{JOINTS})[ \t]+){GAP}", GAP),
    (rf"\([ \t]*{GAP}[ \t]*\)|\"[ \t]*{GAP}[ \t]*\"|\[[ \t]*{GAP}[ \t]*\]", GAP),
    (rf"(?i)\b(?:{JOINTS})[ \t]*{GAP}", GAP),
    (rf"(?i)((?:^|[:;,(\n]|\.[ \t])[ \t]*){GAP}[ \t]*(?:(?:{JOINTS})[ \t]+|[/&+][ \t]*)", rf"\1{GAP} "),
    (rf"([^\s:;,(.])[ \t]*[/&+][ \t]*{GAP}", rf"\1 {GAP}"),
    (rf"([:;,(])[ \t]*{GAP}[ \t]*[,;][ \t]*", r"\1 "),  # an item among others
    (rf"(^|\n|\.[ \t]+){GAP}[ \t]*[,;][ \t]*", r"\1"),  # the first
    (rf"[ \t]*[,;][ \t]*{GAP}[ \t]*($|\n|\)|\.(?:\s|$))", r"\1"),  # the last
    (rf"(^|\n|\.[ \t]+|[,;][ \t]*)[A-Za-z][\w ()/'\-]*:[ \t]*{GAP}[ \t]*(;|$|\n|\.(?:\s|$))", rf"\1{GAP}\2"),
    (rf"(^|\n|[.!?][ \t]+){GAP}[ \t]*[.!?](?:[ \t]+|$)", r"\1"),  # a sentence of its own
    (rf"(^|\n|[.!?][ \t]+){GAP}[ \t]*[.!?]\n", f"\\1{GAP}\n"),
    (rf"(^|\n)[ \t]*{GAP}[ \t]*\n", r"\1"),
    (rf"\n[ \t]*{GAP}[ \t]*$", ""),
)
CLOSE = (
    (rf"(^|\n|\()[ \t]*{GAP}[ \t]*", r"\1"),
    (rf"[ \t]*{GAP}([.,;:!?)\n])", r"\1"),
    (rf"[ \t]*{GAP}[ \t]*$", ""),
    (rf"[ \t]*{GAP}[ \t]*", " "),
    (r"[ \t]+($|\n)", r"\1"),
)
IN_DIAGNOSES = (
    rf"(?i)((?:^|\n|\.[ \t]+)[^:;.\n]*diagnos[^:;.\n]*:(?:[^;{GAP}\n]*;)*)[ \t]*[^;{GAP}\n]*{GAP}"
    rf"(?:[^;.\n]|\.[^\s;])*(;|\.|$|\n)"
)


@dataclass(frozen=True)
class Leaks:
    """The patterns of a mode: one that finds any term, and one for each group of terms, in the order of the table."""

    any_term: str
    groups: dict[str, str]


@functools.cache
def read(mode: str) -> Leaks | None:
    """The patterns of `standard` or `aggressive`; None for `none`."""
    if mode == "none":
        return None
    table = pd.read_csv(SHIPPED, dtype=str, keep_default_na=False, comment="#")
    modes = ("standard", "aggressive") if mode == "aggressive" else ("standard",)
    terms = table[table["mode"].isin(modes)]
    before = _either(table.loc[table["mode"] == "before", "term"], plural=False)
    after = _either(table.loc[table["mode"] == "after", "term"], plural=False)
    names = list(dict.fromkeys(terms["of"]))
    groups = {
        name: rf"(?i)(?:\?[ \t]*)?(?:\b{before}[ \t]+)*\b{_either(terms.loc[terms['of'] == name, 'term'])}\b"
        rf"(?:,?[ \t]+{after}\b)*"
        for name in names
    }
    return Leaks(rf"(?i)\b{_either(terms['term'])}\b", groups)


def _either(terms: pd.Series, plural: bool = True) -> str:
    ways = [_term(term, plural) for term in sorted(terms, key=lambda term: (-len(term), term))]
    return f"(?:{'|'.join(ways)})"


def _term(term: str, plural: bool) -> str:
    stem = r"[ \t\-]*".join(re.escape(word) for word in term.rstrip("*").split())
    return stem + (r"\w*" if term.endswith("*") else "(?:e?s)?" if plural else "")


def remove(text: str, mode: str = "standard") -> str:
    """One text without its leaks."""
    return remove_all([text], mode)[0]


def remove_all(texts: Sequence[str], mode: str = "standard") -> list[str]:
    """Texts without their leaks."""
    return apply(pa.array(texts, pa.string()), mode)[0].to_pylist()


def apply(texts: pa.Array, mode: str) -> tuple[pa.Array, dict[str, pa.Array]]:
    """Filter texts.

    Args:
        texts: (N,) strings; null stays null. mode: `none`, `standard`, `aggressive`.
    Returns: the filtered texts (empty where nothing is left), and the number of terms removed: group -> (N,) int64.
    """
    leaks = read(mode)
    if leaks is None:
        return texts, {}
    return _apply(texts, leaks)


def _apply(texts: pa.Array, leaks: Leaks) -> tuple[pa.Array, dict[str, pa.Array]]:
    zero = pa.array([0] * len(texts), pa.int64())
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    counts = dict.fromkeys(leaks.groups, zero)
    while True:  # what a removal brings together may be a term as well
        found = pc.fill_null(pc.match_substring_regex(texts, leaks.any_term), False)
        if not pc.any(found).as_py():
            return texts, counts
        some = pc.replace_substring(pc.filter(texts, found), GAP, "")
        for name, pattern in leaks.groups.items():
            marked = pc.replace_substring_regex(some, pattern, GAP)
            new = pc.subtract(pc.count_substring(marked, GAP), pc.count_substring(some, GAP))
            counts[name] = pc.add(counts[name], pc.replace_with_mask(zero, found, pc.cast(new, pa.int64())))
            some = marked
        texts = pc.replace_with_mask(texts, found, _mended(some))


def _mended(texts: pa.Array) -> pa.Array:
    """Take out the gaps, and what makes no sense beside them."""
    texts = _settle(texts, ((IN_DIAGNOSES, rf"\1 {GAP}\2"),))
    texts = _settle(texts, MEND)
    for pattern, by in CLOSE:
        texts = pc.replace_substring_regex(texts, pattern, by)
    return texts


def _settle(texts: pa.Array, rules: Sequence[tuple[str, str]]) -> pa.Array:
    """Apply rules until they change nothing."""
    while True:
        after = texts
        for pattern, by in rules:
            after = pc.replace_substring_regex(after, pattern, by)
        if after.equals(texts):
            return texts
        texts = after
