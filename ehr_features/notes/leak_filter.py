"""The leak filter: takes terms of the 14 findings and of radiology out of a text.

Input: texts. Output: the texts without the terms of leak_terms.csv, and their counts. The result depends on the
text alone: no label, no other text, no fitted list. `standard` removes terms of the findings and of imaging;
`aggressive` also related organs, diseases and procedures.

A term is removed with its modifiers (`acute`, `bilateral`, `organism unspecified`); in a list of diagnoses the whole
item between semicolons is removed. Empty items, labels and sentences are cleaned up. Text without a term is unchanged,
byte for byte, numbers are never changed, and text is not split into sentences. The filter is idempotent.

Differs from the published filter, which dropped the sentences (split at every full stop, decimals included) that named
a positive finding of the film: the gap in the note then encodes the label.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

SHIPPED = Path(__file__).with_name("leak_terms.csv")
GAP = "\ue000"  # placeholder of a removed term; a private-use character
LINE = "\ue003"  # stands for an underscore, to RE2 a word character: `___PNA`
WIDE = "[\uff01-\uff5e\ufb00-\ufb06]"  # full-width letters and ligatures
LETTER = "_\ue001", "\ue002_"  # around letters beyond ASCII, to RE2 no word characters: `\\b` is then none beside them
BETWEEN = "[ \\t\u00a0\u2010-\u2015\u2212\\-]*"  # the words of a term
JOINTS = (
    "and/or|and|or|with|without|w/|w/o|for|of|due to|secondary to|from|versus|vs|on|in|by|at|to|per|via|after|"
    "show|shows|showed|showing|found to have|diagnosed with|complains of|complaining of|treated for"
)

# applied to a line in this order until it is stable; only beside gaps
MEND = (
    (rf"(?i){GAP}(?:[ \t,:;/&+\-]*|[ \t]+(?:{JOINTS})[ \t]+){GAP}", GAP),
    (rf"(^|[ \t,:;(])(?:[+\-]+|\([+\-]+\))[ \t]*{GAP}", rf"\1{GAP}"),  # `+CXR`
    (rf"{GAP}[ \t]*(?::|[+\-]+|\([+\-]+\))([ \t,;.)]|$)", rf"{GAP}\1"),  # `CXR: ...`, `CXR (+)`
    (rf"\([ \t]*{GAP}[ \t]*\)|\"[ \t]*{GAP}[ \t]*\"|\[[ \t]*{GAP}[ \t]*\]", GAP),
    (rf"(?i)\b(?:{JOINTS})[ \t]*{GAP}", GAP),
    (rf"{GAP}(?:-+|\.)([A-Za-z])|{GAP}-+(\d)", rf"{GAP} \1\2"),  # `chf-related`, `chf.exac`
    (rf"([A-Za-z\d])-+{GAP}", rf"\1 {GAP}"),
    (rf"([A-Za-z])\.{GAP}", rf"\1. {GAP}"),
    (rf"{GAP}['\x{{2019}}](?:s|d)\b", GAP),
    (rf"{GAP}\.([,;/)])", rf"{GAP}\1"),  # the last dot of `c.h.f.`
    (rf"(?i)((?:^|[:;,(]|\.[ \t])[ \t]*){GAP}[ \t]*(?:(?:{JOINTS})[ \t]+|[/&+][ \t]*)", rf"\1{GAP} "),
    (rf"([^\s:;,(.])[ \t]*[/&+][ \t]*{GAP}", rf"\1 {GAP}"),
    (rf"([:;,(])[ \t]*{GAP}[ \t]*[,;][ \t]*", r"\1 "),  # an item among others
    (rf"(^|\.[ \t]+){GAP}[ \t]*[,;][ \t]*", r"\1"),  # the first
    (rf"[ \t]*[,;][ \t]*{GAP}[ \t]*($|\)|\.(?:\s|$))", r"\1"),  # the last
    (rf"(^|\.[ \t]+|[,;][ \t]*)[A-Za-z][\w ()/'\-]*:[ \t]*{GAP}[ \t]*(;|$|\.(?:\s|$))", rf"\1{GAP}\2"),  # a label
    (rf"(^|[.!?][ \t]+){GAP}[ \t]*[.!?](?:[ \t]+|$)", r"\1"),  # a sentence of its own
)
CLOSE = (
    (rf"(^|\()[ \t]*{GAP}[ \t]*", r"\1"),
    (rf"[ \t]*{GAP}([.,;:!?)])", r"\1"),
    (rf"[ \t]*{GAP}[ \t]*$", ""),
    (rf"[ \t]*{GAP}[ \t]*", " "),
    (r"^[ \t]*[,;.]*[ \t]*$|[ \t]+$", ""),
)
DIAGNOSES = (  # a labelled list of diagnoses; `E. coli` does not end it
    r"(?i)^(?P<head>(?:.*?\.[ \t]+)?[^:;.]*diagnos[^:;.]*:)"
    r"(?P<items>(?:.*;)?(?:[^.;]|\.[^\s;]|\.\s+(?-i:[a-z]))*)(?P<tail>(?:\.(?:\s.*)?)?)$"
)


@dataclass(frozen=True)
class Leaks:
    """The patterns of a mode: one that finds any term; and for each group of terms, in the order of the table, one that
    finds them, and one that finds them with their modifiers.
    """

    any_term: str
    groups: dict[str, tuple[str, str]]


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
    groups = {}
    for name in names:
        own = rf"\b{_either(terms.loc[terms['of'] == name, 'term'])}\b"
        groups[name] = f"(?i){own}", rf"(?i)(?:\?[ \t]*)?(?:\b{before}[ \t]+)*{own}(?:,?[ \t]+{after}\b)*"
    return Leaks(rf"(?i)\b{_either(terms['term'])}\b", groups)


def _either(terms: pd.Series, plural: bool = True) -> str:
    ways = [_term(term, plural) for term in sorted(terms, key=lambda term: (-len(term), term))]
    return f"(?:{'|'.join(ways)})"


def _term(term: str, plural: bool) -> str:
    stem = BETWEEN.join(re.escape(word) for word in term.rstrip("*").split())
    if plural and re.fullmatch("[a-z]{2,5}", term):
        stem = f"(?:{stem}|{'[.]'.join(term)})"
    return stem + ("[a-z]*" if term.endswith("*") else "(?:e?s)?" if plural else "")


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
    Returns: the filtered texts (empty if nothing is left), and the number of terms removed: group -> (N,) int64. A line
        that becomes empty is removed with its line break.
    """
    leaks = read(mode)
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    if leaks is None or not len(texts):
        return texts, {name: pa.array([], pa.int64()) for name in (leaks.groups if leaks else ())}
    if not pc.any(pc.match_substring(texts, "\n")).as_py():
        return _lines(texts, leaks)
    split = pc.split_pattern(texts, "\n")
    lines, of = split.flatten(), pc.list_parent_indices(split).to_numpy()
    left, counts = _lines(lines, leaks)
    stays = pc.or_(pc.not_equal(left, ""), pc.equal(lines, "")).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.bincount(of[stays], minlength=len(texts)).cumsum()])
    kept = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), left.filter(pa.array(stays)))
    joined = pc.if_else(pc.is_null(texts), None, pc.binary_join(kept, "\n"))
    return joined, {
        name: pa.array(np.bincount(of, n.to_numpy(), len(texts)).astype(np.int64)) for name, n in counts.items()
    }


def _lines(texts: pa.Array, leaks: Leaks) -> tuple[pa.Array, dict[str, pa.Array]]:
    zero = pa.array([0] * len(texts), pa.int64())
    whole = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    counts, touched = dict.fromkeys(leaks.groups, zero), pa.array([False] * len(texts))
    texts = _guarded(whole)
    while True:  # a removal may join words into another term
        found = pc.fill_null(pc.match_substring_regex(texts, leaks.any_term), False)
        if not pc.any(found).as_py():
            return pc.if_else(touched, _unguarded(texts), whole), counts
        touched = pc.or_(touched, found)
        some = pc.replace_substring(pc.filter(texts, found), GAP, "")
        for name, (term, pattern) in leaks.groups.items():
            if not pc.any(pc.match_substring_regex(some, term)).as_py():
                continue
            marked = pc.replace_substring_regex(some, pattern, GAP)
            new = pc.subtract(pc.count_substring(marked, GAP), pc.count_substring(some, GAP))
            counts[name] = pc.add(counts[name], pc.replace_with_mask(zero, found, pc.cast(new, pa.int64())))
            some = marked
        texts = pc.replace_with_mask(texts, found, _mended(some))


def _guarded(texts: pa.Array) -> pa.Array:
    """Mark non-ASCII letters as parts of words, and underscores as separators.

    Soft hyphens and full-width letters, which hide a term, are normalised.
    """
    if not pc.any(pc.match_substring_regex(texts, r"[^\x00-\x7f]|_")).as_py():
        return texts
    texts = pc.if_else(pc.match_substring_regex(texts, WIDE), pc.utf8_normalize(texts, "NFKC"), texts)
    hidden = r"[\x{e001}-\x{e003}]|\p{Cf}"  # ours; soft hyphens, spaces of no width
    clean = pc.replace_substring(pc.replace_substring_regex(texts, hidden, ""), "_", LINE)
    parts = r"((?:[^\x00-\x{a9}\P{Latin}]|\p{Greek}|\p{Cyrillic}|\pM)+)"  # Latin beyond ASCII, accents, ...
    return pc.replace_substring_regex(clean, parts, LETTER[0] + r"\1" + LETTER[1])


def _unguarded(texts: pa.Array) -> pa.Array:
    texts = pc.replace_substring(pc.replace_substring(texts, LETTER[0], ""), LETTER[1], "")
    return pc.replace_substring(texts, LINE, "_")


def _mended(texts: pa.Array) -> pa.Array:
    """Remove the gaps and the punctuation and labels that they leave behind."""
    texts = _settle(_whole_items(texts), MEND)
    for pattern, by in CLOSE:
        texts = pc.replace_substring_regex(texts, pattern, by)
    return texts


def _whole_items(texts: pa.Array) -> pa.Array:
    """In a list of diagnoses, remove the whole item between semicolons: half of a title identifies the rest."""
    parts = pc.extract_regex(texts, DIAGNOSES)
    head, items, tail = (pc.struct_field(parts, name) for name in ("head", "items", "tail"))
    items = pc.replace_substring_regex(items, rf"(^|;)[^;]*{GAP}[^;]*", rf"\1 {GAP}")
    return pc.coalesce(pc.binary_join_element_wise(head, items, tail, ""), texts)


def _settle(texts: pa.Array, rules: Sequence[tuple[str, str]]) -> pa.Array:
    """Apply rules until the text is stable."""
    while True:
        after = texts
        for pattern, by in rules:
            after = pc.replace_substring_regex(after, pattern, by)
        if after.equals(texts):
            return texts
        texts = after
