"""Changes of tuples, lists, sets, intervals and matrices that change the value."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import inf, isinf

from oracle import differ, number

Change = tuple[str, str]  # the kind and the changed text
Interval = tuple[str, str, str, str]  # bracket, end, end, bracket
_TEMPLATES = [
    "({})+1", "({})-1", "-({})", "2({})", "({})^2", "({})i", "({})+0.001", r"\frac{{1}}{{{}}}", r"({})+\sqrt{{2}}",
    "({})+10", "10({})", "({})^3", r"\frac{{{}}}{{2}}", r"({})\pi", "e^{{{}}}", "100-({})",
]  # fmt: skip
_LEFT_SIDES = {"-x": "-({})", "2x": r"\frac{{{}}}{{2}}", "x^2": r"\sqrt{{{}}}", r"\ln x": "e^{{{}}}", "e^x": r"\ln({})"}
_FUNCTIONS = [r"\ln{}", r"\sqrt{{{}}}", "|{}|", "{}^2", r"\sin{}", "{}+1", "2{}", "-{}", "{}^3"]
_INTERVAL = re.compile(r"([(\[])([^()\[\],]+),([^()\[\],]+)([)\]])")


def read_members(gold: str) -> tuple[str, list[str]] | None:
    """The opening bracket and the members, if the oracle can read all of them."""
    text = re.sub(r"\\left|\\right|\\[,;]", "", gold).strip()
    match = re.fullmatch(r"(\(|\\\{)(.*)(?:\)|\\\})", text, re.DOTALL)
    opening, content = match.groups() if match else ("", text)
    members = [member.strip() for member in content.split(",")]
    is_number = not opening and re.search(r"\d,\d{3}|\{,\}|,\\!", gold)
    if len(members) < 2 or is_number or any(not _is_readable(member) for member in members):
        return None
    return opening, members


def member_changes(opening: str, members: list[str]) -> Iterator[Change]:
    is_tuple = opening == "("
    for index, member in enumerate(members):
        head, tail = members[:index], members[index + 1 :]
        for changed in ([*head, template.format(member), *tail] for template in _TEMPLATES):
            if differ(member, changed[index]) and (
                is_tuple or _value_counts(changed) not in (None, _value_counts(members))
            ):
                yield "member", _text(opening, changed)
        if opening != r"\{":
            yield "twice", _text(opening, [*head, member, member, *tail])
        yield "one less", _text(opening, [*head, *tail]) if len(members) > 2 else member
    for first, second in combinations(range(len(members)), 2):
        if differ(members[first], members[second]):
            yield from _pair_changes(opening, members, first, second)
    yield "one more", _text(opening, [*members, "1234"])
    yield "one more", _text(opening, ["-99", *members])
    yield "half", members[0]
    yield "half", members[-1]
    yield "product", r" \cdot ".join(f"({member})" for member in members)
    yield "sum", "+".join(f"({member})" for member in members)
    if all(re.fullmatch(r"\d+", member) for member in members):
        yield "joined", "".join(members)
    yield from _tuple_changes(members) if is_tuple else _list_changes(members)


def _pair_changes(opening: str, members: list[str], first: int, second: int) -> Iterator[Change]:
    swapped, copied = list(members), list(members)
    swapped[first], swapped[second] = members[second], members[first]
    copied[first] = members[second]
    if opening == "(":
        yield "order", _text(opening, swapped)
        yield "order", f"({', '.join('xyzwuv'[: len(members)])}) = {_text(opening, swapped)}"
    yield "multiplicity", _text(opening, copied)


def _tuple_changes(members: list[str]) -> Iterator[Change]:
    inside = ", ".join(members)
    yield "set", rf"\{{{inside}\}}"
    yield "function", rf"f({inside})"
    if len(members) == 2:
        yield "brackets", f"[{inside}]"
    if any(differ(member, "0") for member in members):
        yield from (("factor", f"{factor}({inside})") for factor in ("3", "-", "2"))
    yield from (("function", form.format(f"({inside})")) for form in (r"\ln{}", r"\sqrt{{{}}}", "|{}|", "{}^2"))


def _list_changes(members: list[str]) -> Iterator[Change]:
    inside = ", ".join(members)
    for form in _FUNCTIONS:
        changed = [form.format(f"({member})") for member in members]
        if _value_counts(changed) not in (None, _value_counts(members)):
            yield "function", ", ".join(changed)
    for left, form in _LEFT_SIDES.items():
        if _value_counts([form.format(member) for member in members]) not in (None, _value_counts(members)):
            yield "left side", f"{left} = {inside}"
    yield "bound", f"x > {members[0]}, x < {members[1]}"
    yield "tuple", f"({inside}, 0)"
    yield "words", rf"{inside} \text{{ or more}}"
    yield "words", rf"\text{{not }} {inside}"


def _text(opening: str, members: list[str]) -> str:
    return opening + ", ".join(members) + {"(": ")", r"\{": r"\}", "": ""}[opening]


def _is_readable(text: str) -> bool:
    return number(text) is not None or differ(text, f"({text})+1")


def _value_counts(members: list[str]) -> Counter[str] | None:
    """Counts of the values, rounded to 12 digits; None if one is unknown."""
    values = [number(member) for member in members]
    known_values = [value for value in values if value is not None]
    if len(known_values) < len(values):
        return None
    return Counter(f"{float(value.real) + 0.0:.12g} {float(value.imag) + 0.0:.12g}" for value in known_values)


def read_intervals(gold: str) -> list[Interval]:
    """The parts of an interval or a union; empty if it could be a point."""
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\!", "", gold)
    matches = [_INTERVAL.fullmatch(part.strip()) for part in text.split(r"\cup")]
    if not re.search(r"[\[\]]|infty|cup", gold):
        return []
    parts = [(part[1], part[2].strip(), part[3].strip(), part[4]) for part in matches if part]
    is_read = len(parts) == len(matches) and all(_end(low) is not None is not _end(high) for _, low, high, _ in parts)
    return parts if is_read else []


def interval_changes(parts: list[Interval]) -> Iterator[Change]:
    real_line: Interval = ("(", r"-\infty", r"\infty", ")")
    changes = [("one more", [*parts, ("[", "1234", "1235", "]")]), ("one more", [("[", "-1235", "-1234", ")"), *parts])]
    changes += [("all", [real_line]), ("sign", [_mirrored(part) for part in parts])]
    for index, part in enumerate(parts):
        changes += [(kind, [*parts[:index], changed, *parts[index + 1 :]]) for kind, changed in _end_changes(*part)]
        changes += [("one less", [*parts[:index], *parts[index + 1 :]])] if len(parts) > 1 else []
    for kind, changed in changes:
        if _differ(parts, changed):
            yield kind, _union(changed)
            yield f"{kind}, named", rf"x \in {_union(changed)}"
    yield from _set_changes(parts)
    if len(parts) == 1:
        yield from _bounded_changes(*parts[0])


def _end_changes(opening: str, low: str, high: str, closing: str) -> Iterator[tuple[str, Interval]]:
    """Changes of one end: moved, opened, closed or dropped."""
    templates = [*(template for template in _TEMPLATES if template != "({})i"), "({})-0.01", "-1234", "1234"]
    if "infty" not in low:
        yield from (("end", (opening, form.format(low), high, closing)) for form in templates)
        yield "open or closed", ("[" if opening == "(" else "(", low, high, closing)
        yield "end", ("(", r"-\infty", high, closing)
    if "infty" not in high:
        yield from (("end", (opening, low, form.format(high), closing)) for form in templates)
        yield "open or closed", (opening, low, high, "]" if closing == ")" else ")")
        yield "end", (opening, low, r"\infty", ")")


def _set_changes(parts: list[Interval]) -> Iterator[Change]:
    text = _union(parts)
    for form in (r"\mathbb{{R}} \setminus ({})", r"x \notin {}", r"\ln x \in {}", r"x + 1234 \in {}"):
        if parts != [("(", r"-\infty", r"\infty", ")")]:
            yield "set", form.format(text)
    if not _has(parts, 1234.5):
        yield "point", rf"{text} \cup \{{1234.5\}}"
    for low, high in ((_end(low), _end(high)) for _, low, high, _ in parts):
        if low is not None and high is not None and low < high:
            point = max(low, -9999.0) / 2 + min(high, 9999.0) / 2
            yield "point", rf"({text}) \setminus \{{{point:.9g}\}}"
            yield "half", f"{point:.9g}"


def _bounded_changes(opening: str, low: str, high: str, closing: str) -> Iterator[Change]:
    yield from (("half", end) for end in (low, high) if "infty" not in end)
    if "infty" not in low + high:
        yield "set", rf"\{{{low}, {high}\}}"
        yield "reversed", f"{opening}{high}, {low}{closing}"
        for middle in ("x + 1234", r"\ln x", "e^x", "xy"):
            yield "left side", f"{low} < {middle} < {high}"
        yield "reversed", f"{low} > x > {high}"


def _mirrored(part: Interval) -> Interval:
    opening, low, high, closing = part

    def turned(end: str) -> str:
        return {r"\infty": r"-\infty", r"-\infty": r"\infty"}.get(end, f"-({end})")

    return {")": "(", "]": "["}[closing], turned(high), turned(low), {"(": ")", "[": "]"}[opening]


def _union(parts: list[Interval]) -> str:
    return r" \cup ".join(f"{a}{b}, {c}{d}" for a, b, c, d in parts)


def _end(text: str) -> float | None:
    if "infty" in text:
        return -inf if "-" in text else inf
    value = number(text)
    return None if value is None or value.imag else float(value.real)


def _has(parts: list[Interval], point: float) -> bool:
    for opening, low_text, high_text, closing in parts:
        low, high = _end(low_text), _end(high_text)
        if low is None or high is None or low > high:
            continue
        at_end = (opening == "[" and point == low) or (closing == "]" and point == high)
        if low < point < high or (at_end and (low < high or opening + closing == "[]")):
            return True
    return False


def _differ(parts: list[Interval], changed: list[Interval]) -> bool:
    """Whether two unions differ at, between or beside their ends."""
    known_ends = {_end(end) for _, low, high, _ in [*parts, *changed] for end in (low, high)}
    if None in known_ends:
        return False
    ends = sorted(end for end in known_ends if end is not None and not isinf(end)) or [0.0]
    points = [*ends, *((low + high) / 2 for low, high in pairwise(ends)), ends[0] - 1, ends[-1] + 1]
    return any(_has(parts, point) != _has(changed, point) for point in points)


def matrix_changes(content: str) -> Iterator[Change]:
    rows = [[cell.strip() for cell in row.split("&")] for row in content.replace(r"\phantom -", "").split(r"\\")]
    if any(number(cell) is None for row in rows for cell in row):
        return
    for index, row in enumerate(rows):
        for changed in _row_changes(row):
            yield "entry", _matrix([*rows[:index], changed, *rows[index + 1 :]])
        if len(rows) > 1:
            yield "row less", _matrix([*rows[:index], *rows[index + 1 :]])
            yield "row twice", _matrix([*rows[: index + 1], row, *rows[index + 1 :]])
    for first, second in combinations(range(len(rows)), 2):
        if _differ_somewhere(rows[first], rows[second]):
            swapped = list(rows)
            swapped[first], swapped[second] = rows[second], rows[first]
            yield "order", _matrix(swapped)
    columns = [list(column) for column in zip(*rows, strict=True)]
    if len(rows) == len(columns) and any(map(_differ_somewhere, rows, columns)):
        yield "transposed", _matrix(columns)
    yield from _whole_matrix_changes(rows)


def _whole_matrix_changes(rows: list[list[str]]) -> Iterator[Change]:
    text = _matrix(rows)
    cells = [cell for row in rows for cell in row]
    yield from (("half", cell) for cell in cells)
    yield "determinant", _matrix(rows, "vmatrix")
    yield "determinant", rf"\det {text}"
    yield "words", rf"{text} \text{{ or }} 0"
    yield "one more", f"{text}, 1234"
    yield "row more", _matrix([*rows, ["1234"] * len(rows[0])])
    yield "column more", _matrix([[*row, "1234"] for row in rows])
    yield "term", f"{text} + {_matrix([['1'] * len(rows[0])] * len(rows))}"
    yield "sum", "+".join(f"({cell})" for cell in cells)
    if any(differ(cell, "0") for cell in cells):
        yield from (("factor", form.format(text)) for form in ("-{}", "2{}", r"\frac{{1}}{{3}}{}", "{}i", "x{}"))


def _row_changes(row: list[str]) -> Iterator[list[str]]:
    """The row with one entry changed or two entries exchanged."""
    for index, cell in enumerate(row):
        for form in _TEMPLATES:
            if differ(cell, form.format(cell)):
                yield [*row[:index], form.format(cell), *row[index + 1 :]]
        yield [*row[:index], f"{cell}+x", *row[index + 1 :]]
    for first, second in combinations(range(len(row)), 2):
        if differ(row[first], row[second]):
            swapped = list(row)
            swapped[first], swapped[second] = row[second], row[first]
            yield swapped


def _differ_somewhere(left: list[str], right: list[str]) -> bool:
    return any(differ(left_cell, right_cell) for left_cell, right_cell in zip(left, right, strict=True))


def _matrix(rows: list[list[str]], kind: str = "pmatrix") -> str:
    return rf"\begin{{{kind}}} " + r" \\ ".join(" & ".join(row) for row in rows) + rf" \end{{{kind}}}"
