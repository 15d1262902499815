"""The variables of the series, read from channels.yaml."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import ibis.expr.types as ir
import pandas as pd
import pyarrow as pa
from ibis import _
from pydantic import AfterValidator, Field, model_validator

from configs import Settings, UserError, load
from ehr_features.files import file_digest
from ehr_features.raw.engine import hold
from ehr_features.raw.source import Source

SHIPPED = Path(__file__).parents[1] / "channels.yaml"
LABORATORY = range(220_000)  # itemids of hosp/labevents
SPECIMEN_TYPE = 52033  # the laboratory item whose text is the kind of its specimen


class Conversion(Settings):
    """value * factor + add if the value is above `above`; else the value unchanged."""

    factor: float = 1.0
    add: float = 0.0
    above: float = -1e300


CONVERSIONS = {
    "as_is": Conversion(),
    "inches": Conversion(factor=2.54),
    "pounds": Conversion(factor=0.45359237),
    "fahrenheit": Conversion(factor=5 / 9, add=-160 / 9, above=50),
    "celsius": Conversion(factor=5 / 9, add=-160 / 9, above=50),
    "percent_or_fraction": Conversion(factor=0.01, above=1),
}


def celsius(temperature: ir.NumericValue) -> ir.NumericValue:
    """A body temperature in Celsius; values above 50 are Fahrenheit."""
    c = CONVERSIONS["celsius"]
    return (temperature > c.above).ifelse(temperature * c.factor + c.add, temperature)


def _known(conversion: str | Conversion) -> str | Conversion:
    if isinstance(conversion, str) and conversion not in CONVERSIONS:
        raise ValueError(f"is one of {', '.join(CONVERSIONS)}, or {{factor: ..., add: ..., above: ...}}")
    return conversion


class Published(Settings):
    """A variable of the published extraction; without `clean` its values stay text, and compare as text."""

    name: str
    items: tuple[int, ...]
    clean: Literal["text", "number", "hundredth", "saturation", "temperature", "weight"] = "text"
    normal: float | str
    categories: tuple[str, ...] = ()


EmergencyColumn = Literal["temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp"]  # of MIMIC-IV-ED's vitalsign


def _group(items: dict[int, Any]) -> Literal["vitals", "labs"]:
    return "labs" if any(item in LABORATORY for item in items) else "vitals"


class Channel(Settings):
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    unit: str
    range: tuple[float, float]
    normal: float
    items: dict[int, Annotated[str | Conversion, AfterValidator(_known)]] = {}
    measured: tuple[int, ...] = ()
    reported: tuple[int, ...] = ()
    copies: dict[int, tuple[int, ...]] = {}
    specimen: tuple[str, ...] = ()
    text: dict[str, float] = {}
    mark: dict[str, str] = {}
    sum_of: tuple[str, ...] = ()
    stays_observed: Annotated[float, Field(gt=0, le=1)] | None = None
    emergency: dict[EmergencyColumn, Annotated[str | Conversion, AfterValidator(_known)]] = {}
    group: Literal["vitals", "labs"] = Field(default_factory=lambda given: _group(given.get("items", {})))
    series: bool = True
    medfuse: Published | None = None

    @model_validator(mode="after")
    def _complete(self) -> Channel:
        if bool(self.items) == bool(self.sum_of):
            raise ValueError(f"`{self.name}` needs either items or sum_of")
        if self.range[0] > self.range[1]:
            raise ValueError(f"`{self.name}`: range begins above its end")
        if len(self.mark) > 1:
            raise ValueError(f"`{self.name}`: mark is one column: text")
        named = {*self.measured, *self.reported, *self.copies, *(i for of in self.copies.values() for i in of)}
        if absent := sorted(named - set(self.items)):
            raise ValueError(f"`{self.name}`: itemid {absent} of measured, reported or copies is not among its items")
        if both := sorted(set(self.measured) & set(self.reported)):
            raise ValueError(f"`{self.name}`: itemid {both} is both measured and reported")
        if wrong := sorted(set(self.copies) - set(self.reported)):
            raise ValueError(f"`{self.name}`: itemid {wrong} has copies and is not in reported")
        return self

    @property
    def column(self) -> str:
        """The variable's column of images.parquet."""
        return f"{self.group}_{self.name}"

    def is_reported(self, item: int) -> bool:
        """Whether a laboratory reports the item; undeclared items are reported if they are of labevents."""
        return item in self.reported or (item in LABORATORY and item not in self.measured)


class Channels(Settings):
    channels: tuple[Channel, ...]

    @model_validator(mode="after")
    def _distinct(self) -> Channels:
        names = [c.name for c in self.channels] + [m for c in self.channels for m in c.mark]
        items = [i for c in self.channels for i in c.items]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two variables are called {', '.join(twice)}")
        if double := sorted({i for i in items if items.count(i) > 1}):
            raise ValueError(f"itemid {double} belongs to two variables")
        if unknown := sorted({s for c in self.channels for s in c.sum_of} - set(names)):
            raise ValueError(f"sum_of names no variable: {', '.join(unknown)}")
        absent = {c.name for c in self.channels if not c.series}
        if torn := [c.name for c in self.channels if c.series and absent & set(c.sum_of)]:
            raise ValueError(f"{', '.join(torn)}: sum_of names a variable with `series: false`")
        if not any(c.series for c in self.channels):
            raise ValueError("no variable is in the series; leave out `series: false` of at least one")
        taken = [c.column for c in self.channels] + [f"{c.column}_hours" for c in self.channels]
        if both := sorted({n for n in taken if taken.count(n) > 1}):
            raise ValueError(f"two variables have the column {', '.join(both)} of images.parquet; rename one")
        return self


def read_variables(path: Path | None = None) -> tuple[Channel, ...]:
    """The variables of a channels.yaml, also those of the film's record only. Raises: UserError: any fault in it."""
    path = path or SHIPPED
    return _variables(path, file_digest(path) if path.is_file() else "")


@functools.lru_cache(maxsize=4)
def _variables(path: Path, content: str) -> tuple[Channel, ...]:
    """As `read_variables`; a file of the same content is parsed once in a process."""
    return load(Channels, path).channels


def read_channels(path: Path | None = None) -> tuple[Channel, ...]:
    """The variables of the series. Raises: UserError: any fault in the file."""
    return tuple(variable for variable in read_variables(path) if variable.series)


def item_ids(channels: tuple[Channel, ...], preset: str) -> set[int]:
    """The itemids used by a preset."""
    if preset == "medfuse":
        return {i for c in channels if c.medfuse for i in c.medfuse.items}
    return {i for c in channels for i in c.items}


def check_items(source: Source, channels: tuple[Channel, ...], preset: str, path: Path | None = None) -> list[int]:
    """Refuse unknown itemids.

    Returns: itemids of the shipped file that the dictionaries of this release lack; they have no events there.
    Raises: UserError: other itemids that are in neither dictionary; a laboratory result in chartevents (category Labs)
        declared neither as measured nor as reported.
    """
    known: set[int] = set()
    for table in ("d_items", "d_labitems"):
        known |= set(source.table(table).itemid.to_pandas().dropna().astype(int))
    absent = item_ids(channels, preset) - known
    if unknown := sorted(absent - item_ids(read_variables(), preset)):
        owners = sorted({c.name for c in channels if set(unknown) & item_ids((c,), preset)})
        raise UserError(
            f"{path}: itemid {unknown} of {', '.join(owners)} is in neither icu/d_items nor hosp/d_labitems "
            f"({len(known)} items); look it up there by its label"
        )
    declared = {item for c in channels for item in (*c.measured, *c.reported)}
    charted = item_ids(channels, preset) - declared if preset == "default" else set()
    results = source.table("d_items").filter(_.category == "Labs").itemid.to_pyarrow().to_pylist()
    if open_ := sorted(charted & set(results)):
        raise UserError(
            f"{path}: itemid {open_} is a laboratory result in chartevents (category Labs of icu/d_items); list it "
            f"under `reported` (it counts from storetime) or `measured` (at the bedside; it counts from charttime)"
        )
    return sorted(absent)


def item_table(con: object, channels: tuple[Channel, ...]) -> ir.Table:
    """itemid, channel (its number), factor, add, above, low, high, mark (text that is marked, or null), textual, coded
    (its numbers are codes of texts), reported, restricted (only some kinds of specimen count)."""
    rows = []
    for number, channel in enumerate(channels):
        for item, named in channel.items.items():
            c = CONVERSIONS[named] if isinstance(named, str) else named
            mark = next(iter(channel.mark.values()), None)
            role = (bool(channel.text), channel.is_reported(item), bool(channel.specimen))
            rows.append(
                (item, number, c.factor, c.add, c.above, *channel.range, mark, bool(channel.text or mark), *role)
            )
    names = ["itemid", "channel", "factor", "add", "above", "low", "high", "mark", "textual"]
    names += ["coded", "reported", "restricted"]
    frame = pd.DataFrame(rows, columns=names).astype({"mark": "string"})
    return hold(con, "channel_items", pa.Table.from_pandas(frame, preserve_index=False))


def text_table(con: object, channels: tuple[Channel, ...]) -> ir.Table:
    """channel, text (lower case), number."""
    rows = [(n, text.lower().strip(), number) for n, c in enumerate(channels) for text, number in c.text.items()]
    return _table(con, "channel_text", {"channel": pa.int64(), "text": pa.string(), "number": pa.float64()}, rows)


def copy_table(con: object, channels: tuple[Channel, ...]) -> ir.Table:
    """itemid, copied (a laboratory item that the item repeats)."""
    rows = [(item, lab) for c in channels for item, labs in c.copies.items() for lab in labs]
    return _table(con, "channel_copies", {"itemid": pa.int64(), "copied": pa.int64()}, rows)


def specimen_table(con: object, channels: tuple[Channel, ...]) -> ir.Table:
    """channel, kind (as `specimen_kind` gives it): the specimens that count."""
    rows = [(n, kind) for n, c in enumerate(channels) for kind in {k.upper().strip(" .") for k in c.specimen}]
    return _table(con, "channel_specimens", {"channel": pa.int64(), "kind": pa.string()}, rows)


def _table(con: object, name: str, types: dict[str, pa.DataType], rows: list[tuple[Any, ...]]) -> ir.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(types)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
    return hold(con, name, pa.table(arrays, names=list(types)))
