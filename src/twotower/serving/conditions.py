"""The language of conditions on the item table: a grammar, types, bounds, and translation to polars expressions.

The grammar lists everything that a condition may contain, so a condition cannot name a file, a table or a function of
an engine. Polars receives expressions that are built here. Text of the condition reaches it only as literal values and
as names of existing columns.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, reduce
from typing import Any, NoReturn

import numpy as np
import polars as pl
from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput, UnexpectedToken
from numpy.typing import NDArray

from twotower.data.schema.vocabulary import listed
from twotower.errors import InputError

#: Longest condition, in characters.
LONGEST = 4000

#: Deepest nesting of parentheses, NOT, CASE, functions and operators.
DEEPEST = 40

#: Largest number of operators, columns and literals.
MOST_NODES = 1000

#: Maximum number of values in the list of IN; `allow` and `deny` take any number of ids.
MOST_VALUES = 500

#: Maximum number of characters in a LIKE pattern, and of `%` among them.
LONGEST_PATTERN, MOST_WILDCARDS = 200, 10

#: Number of characters of a condition that an error message shows.
SHOWN = 80

GRAMMAR = r"""
?start: disjunction
?disjunction: conjunction | conjunction ("or"i conjunction)+   -> any_of
?conjunction: negation | negation ("and"i negation)+           -> all_of
?negation: predicate | "not"i negation                         -> negated
?predicate: sum
    | sum COMPARISON sum                                       -> comparison
    | sum "is"i NOT? "null"i                                   -> is_null
    | sum "is"i NOT? (TRUE | FALSE)                            -> is_boolean
    | sum NOT? "in"i "(" sum ("," sum)* ")"                    -> in_list
    | sum NOT? "between"i sum "and"i sum                       -> between
    | sum NOT? (LIKE | ILIKE) sum                              -> like
?sum: product | sum PLUS product -> arithmetic | sum MINUS product -> arithmetic
?product: unary | product (TIMES | DIVIDE | MODULO) unary      -> arithmetic
?unary: atom | MINUS unary                                     -> negative
?atom: NUMBER                                                  -> number
    | STRING                                                   -> text
    | (TRUE | FALSE)                                           -> boolean
    | "null"i                                                  -> null
    | (NAME | QUOTED)                                          -> column
    | NAME STRING                                              -> typed_literal
    | NAME "(" (sum ("," sum)*)? ")"                           -> call
    | "case"i ("when"i disjunction "then"i disjunction)+ ("else"i disjunction)? "end"i -> case
    | "(" disjunction ")"                                      -> group

COMPARISON: "<=" | ">=" | "<>" | "!=" | "==" | "=" | "<" | ">"
NOT: "not"i
TRUE: "true"i
FALSE: "false"i
LIKE: "like"i
ILIKE: "ilike"i
PLUS: "+"
MINUS: /-(?!-)/
TIMES: "*"
DIVIDE: /\/(?!\*)/
MODULO: "%"
NUMBER: /([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?/i
STRING: /'([^']|'')*'/
QUOTED: /"([^"]|"")+"/
NAME: /[^\W\d]\w*/i
%ignore /[ \t\r\n]+/
"""

Mask = NDArray[np.bool_]

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "<>": operator.ne,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Term:
    """A typed part of a condition.

    Attributes:
        kind: text, number, boolean, time, null, "list of text" and the like, or other.
        expression: value of the term for each item: a column, a literal, stored values, or AND, OR, NOT and
            comparisons of these.
        literal: value of the term if it is a text or number literal.
        is_leaf: True for a column or a literal.
    """

    kind: str
    expression: pl.Expr
    literal: Any = None
    is_leaf: bool = False


#: Name of a function -> kinds of its arguments, kind of its result, and its implementation.
FUNCTIONS: dict[str, tuple[tuple[str, ...], str, Callable[..., pl.Expr]]] = {
    "abs": (("number",), "number", lambda x: x.abs()),
    "ceil": (("number",), "number", lambda x: x.ceil()),
    "day": (("time",), "number", lambda x: x.dt.day().cast(pl.Int64)),
    "ends_with": (("text", "text"), "boolean", lambda x, end: x.str.ends_with(end)),
    "floor": (("number",), "number", lambda x: x.floor()),
    "length": (("text",), "number", lambda x: x.str.len_chars().cast(pl.Int64)),
    "lower": (("text",), "text", lambda x: x.str.to_lowercase()),
    "month": (("time",), "number", lambda x: x.dt.month().cast(pl.Int64)),
    "round": (("number",), "number", lambda x: x.round()),
    "starts_with": (("text", "text"), "boolean", lambda x, start: x.str.starts_with(start)),
    "upper": (("text",), "text", lambda x: x.str.to_uppercase()),
    "year": (("time",), "number", lambda x: x.dt.year().cast(pl.Int64)),
}
_LIST_FUNCTIONS = ("array_contains", "list_contains", "array_length")
_KNOWN_FUNCTIONS = ", ".join(sorted([*FUNCTIONS, *_LIST_FUNCTIONS, "coalesce"]))


def condition_mask(condition: str, table: pl.DataFrame | None, num_items: int) -> Mask:
    """Return the items for which a condition is true, bool [N].

    A condition is built from columns, literals, comparisons, AND, OR, NOT, IN, BETWEEN, LIKE and ILIKE, IS NULL,
    IS TRUE, CASE, arithmetic, and functions (`FUNCTIONS`, COALESCE and the functions of lists), with SQL's
    three-valued logic: a comparison with NULL is unknown, and an item for which the condition is unknown does not
    pass. NaN counts as NULL, and so does a division by zero.

    Args:
        condition: text such as `country = 'FR' and price < 20`.
        table: the item table, one row per item, or None.
        num_items: N, number of items in the catalog.

    Raises:
        InputError: the condition cannot be parsed, is too long or too deeply nested, names an unknown column or
            function, or combines incompatible types; or there is no item table.
    """
    if table is None:
        raise InputError("filter: the model has no item table; train with --items FILE to filter by its columns")
    if not isinstance(condition, str):
        raise InputError(f"filter: expected text such as price < 20, found {type(condition).__name__}")
    if not condition.strip() or len(condition) > LONGEST:
        raise InputError(f"filter: expected a condition of 1 to {LONGEST:,} characters, found {len(condition):,}")
    builder = _Builder(condition, table)
    try:
        result = builder.term(_parsed(condition, builder.refuse))
        if result.kind != "boolean" or not builder.columns:
            builder.refuse(
                f"expected a condition that is true or false for each item, found {_a(result.kind)}", types=True
            )
        passes = builder.evaluate(result.expression)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):  # the message may name files of this machine
        builder.refuse("it cannot be evaluated on these columns", types=True)
    if passes.dtype != pl.Boolean or len(passes) != num_items:
        builder.refuse("it cannot be evaluated on these columns", types=True)
    mask: Mask = passes.fill_null(value=False).to_numpy()
    return mask


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr", maybe_placeholders=False)


def _parsed(condition: str, refuse: Callable[[str], NoReturn]) -> Tree[Token]:
    """Parse a condition and check its depth and size, both without recursion."""
    try:
        tree = _parser().parse(condition)
    except UnexpectedInput as error:
        token = error.token if isinstance(error, UnexpectedToken) else None
        if token is not None and token.type == "$END":
            found = "it ends too early"
        else:
            at = error.pos_in_stream or 0
            found = f"found {str(token or condition[at])[:20]!r} at character {at + 1}, which is not expected there"
        refuse(f"{found}; expected SQL such as price < 20")
    level, depth, count = [tree], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        level = [child for node in level for child in node.children if isinstance(child, Tree)]
        if depth > DEEPEST or count > MOST_NODES:
            refuse(f"expected at most {DEEPEST} levels and {MOST_NODES:,} operators and values, found more")
    return tree


class _Builder:
    """Translator of the tree of one condition into a polars expression over one table."""

    def __init__(self, condition: str, table: pl.DataFrame) -> None:
        self._shown = condition if len(condition) <= SHOWN else condition[:SHOWN] + "..."
        self._table = table
        self.columns: list[str] = []

    def refuse(self, message: str, *, types: bool = False) -> NoReturn:
        """Raise an error about the condition; `types` adds the types of its columns."""
        if types:
            shown = [f"{name} is {self._table.schema[name]}" for name in self.columns[:5]]
            message += f" ({', '.join(shown) or 'no column named'})"
        raise InputError(f"filter {self._shown!r}: {message}")

    def term(self, node: Any) -> Term:
        """Translate a node recursively; the depth of the tree is bounded."""
        made: Term = getattr(self, f"_{node.data}")(node.children)
        return made

    def evaluate(self, expression: pl.Expr) -> pl.Series:
        """Evaluate an expression for every item."""
        # `with_columns` repeats a constant for every item.
        return self._table.with_columns(expression.alias("\0"))["\0"]

    def _stored(self, kind: str, expression: pl.Expr) -> Term:
        """Evaluate a term now: polars often evaluates an operand twice, so the work would double at each level."""
        return Term(kind, pl.lit(self.evaluate(expression)))

    def _predicate(self, expression: pl.Expr, *terms: Term, negative: bool = False) -> Term:
        """Return a predicate on some terms; if these are stored, store the predicate instead to free them."""
        expression = ~expression if negative else expression
        if all(term.is_leaf for term in terms):
            return Term("boolean", expression)
        return self._stored("boolean", expression)

    def _value(self, child: Any) -> Term:
        """Translate an operand that may be evaluated repeatedly; a condition in parentheses is evaluated now."""
        term = self.term(child)
        return term if term.is_leaf or term.kind != "boolean" else self._stored("boolean", term.expression)

    # Logic

    def _group(self, children: list[Any]) -> Term:
        return self.term(children[0])

    def _any_of(self, children: list[Any]) -> Term:
        return Term("boolean", _balanced(operator.or_, [self._boolean_of(child) for child in children]))

    def _all_of(self, children: list[Any]) -> Term:
        return Term("boolean", _balanced(operator.and_, [self._boolean_of(child) for child in children]))

    def _negated(self, children: list[Any]) -> Term:
        return Term("boolean", ~self._boolean_of(children[0]))

    def _boolean_of(self, child: Any) -> pl.Expr:
        term = self._as(self.term(child), "boolean")
        if term.kind != "boolean":
            self.refuse(f"AND, OR, NOT and WHEN take conditions, found {_a(term.kind)}", types=True)
        return term.expression

    # Predicates

    def _comparison(self, children: list[Any]) -> Term:
        left, right = self._value(children[0]), self._value(children[2])
        return self._predicate(self._compared(str(children[1]), left, right), left, right)

    def _compared(self, sign: str, left: Term, right: Term) -> pl.Expr:
        left, right = self._to_same_kind(left, right)
        if left.kind == "null":
            return pl.lit(None, dtype=pl.Boolean)
        found: pl.Expr = _COMPARISONS[sign](left.expression, right.expression)
        return found

    def _to_same_kind(self, left: Term, right: Term) -> tuple[Term, Term]:
        """Convert two terms to one kind that can be compared."""
        left, right = self._as(left, right.kind), self._as(right, left.kind)
        if left.kind != right.kind or left.kind.startswith(("list", "other")):
            self.refuse(f"{_a(left.kind)} cannot be compared with {_a(right.kind)}", types=True)
        return left, right

    def _as(self, term: Term, kind: str) -> Term:
        """Convert NULL to `kind`, and a text literal to a time if `kind` is time; return other terms unchanged."""
        if term.kind == "null":
            dtypes: dict[str, pl.DataType | type[pl.DataType]] = {
                "text": pl.String,
                "number": pl.Float64,
                "boolean": pl.Boolean,
                "time": pl.Datetime("us"),
            }
            return Term(kind, pl.lit(None, dtype=dtypes[kind])) if kind in dtypes else term
        if kind == "time" and term.kind == "text" and term.literal is not None:
            return self._moment(term.literal)
        return term

    def _moment(self, text: str) -> Term:
        try:
            moment = datetime.fromisoformat(text)
            # Columns are compared in UTC, without a time zone.
            moment = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
        except (ValueError, OverflowError):
            self.refuse(f"expected a date or time such as '2024-05-31', found {text[:40]!r}")
        return Term("time", pl.lit(moment, dtype=pl.Datetime("us")), is_leaf=True)

    def _is_null(self, children: list[Any]) -> Term:
        term = self._value(children[0])
        return self._predicate(term.expression.is_null(), term, negative=len(children) > 1)

    def _is_boolean(self, children: list[Any]) -> Term:
        wanted = children[-1].type == "TRUE"
        found = self._boolean_of(children[0]).eq_missing(pl.lit(wanted))
        return self._stored("boolean", ~found if len(children) > 2 else found)

    def _in_list(self, children: list[Any]) -> Term:
        first, negative, values = _with_not(children)
        if len(values) > MOST_VALUES:
            self.refuse(f"expected at most {MOST_VALUES:,} values in IN, found {len(values):,}; use the allow list")
        left, found = self._value(first), [self._value(value) for value in values]
        texts = [value.literal for value in found]
        if left.kind == "text" and all(isinstance(text, str) for text in texts):
            expression = left.expression.is_in(pl.Series(texts, dtype=pl.String).implode())
        else:
            expression = _balanced(operator.or_, [self._compared("=", left, value) for value in found])
        return self._predicate(expression, left, *found, negative=negative)

    def _between(self, children: list[Any]) -> Term:
        first, negative, (low, high) = _with_not(children)
        middle, least, most = self._value(first), self._value(low), self._value(high)
        inside = self._compared(">=", middle, least) & self._compared("<=", middle, most)
        return self._predicate(inside, middle, least, most, negative=negative)

    def _like(self, children: list[Any]) -> Term:
        first, negative, (kind, last) = _with_not(children)
        text, pattern = self._as(self.term(first), "text"), self._as(self.term(last), "text")
        if text.kind != "text" or pattern.kind != "text":
            self.refuse("LIKE compares text with a pattern in single quotes", types=True)
        if last.data == "null":
            return Term("boolean", pl.lit(None, dtype=pl.Boolean))
        if pattern.literal is None:
            self.refuse("LIKE takes a pattern in single quotes, found an expression")
        expression = text.expression.str.contains(self._regex(pattern.literal, ignore_case=kind.type == "ILIKE"))
        return self._predicate(expression, text, negative=negative)

    def _regex(self, pattern: str, *, ignore_case: bool) -> str:
        """Translate a LIKE pattern: `%` matches any text, `_` any character, and every other character itself."""
        short = re.sub("%+", "%", pattern)
        if len(short) > LONGEST_PATTERN or short.count("%") > MOST_WILDCARDS:
            self.refuse(
                f"expected a LIKE pattern of at most {LONGEST_PATTERN} characters and {MOST_WILDCARDS} wildcards (%), "
                f"found {len(short):,} characters and {short.count('%')} wildcards"
            )
        escaped = re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", short)
        return f"(?s{'i' if ignore_case else ''})\\A{escaped.replace('%', '.*').replace('_', '.')}\\z"

    # Values

    def _case(self, children: list[Any]) -> Term:
        pairs = list(zip(children[0::2], children[1::2], strict=False))
        conditions = [self._boolean_of(when) for when, _ in pairs]
        results = [self._value(then) for _, then in pairs]
        if len(children) % 2:
            results.append(self._value(children[-1]))
        results = self._common("CASE", results)
        otherwise = results[-1].expression if len(children) % 2 else pl.lit(None)
        for when, then in zip(reversed(conditions), reversed(results[: len(pairs)]), strict=True):
            otherwise = pl.when(when).then(then.expression).otherwise(otherwise)
        return self._stored(results[0].kind, otherwise)

    def _common(self, name: str, terms: list[Term]) -> list[Term]:
        """Convert terms to the kind of the first that is not NULL."""
        kind = next((term.kind for term in terms if term.kind != "null"), "null")
        terms = [self._as(term, kind) for term in terms]
        if any(term.kind != kind for term in terms):
            self.refuse(f"{name}: expected values of one kind, found {' and '.join(_a(t.kind) for t in terms[:4])}")
        return terms

    def _arithmetic(self, children: list[Any]) -> Term:
        left, sign, right = children
        a, b = self._number_of(left), self._number_of(right)
        if sign.type in ("DIVIDE", "MODULO"):
            b = pl.when(b != 0).then(b)
        operations: dict[str, Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
            "PLUS": operator.add,
            "MINUS": operator.sub,
            "TIMES": operator.mul,
            "DIVIDE": operator.truediv,
            "MODULO": operator.mod,
        }
        return self._stored("number", operations[sign.type](a, b).fill_nan(None))

    def _negative(self, children: list[Any]) -> Term:
        inner = children[-1]
        if inner.data == "number":
            return self._number([f"-{inner.children[0]}"])
        return self._stored("number", -self._number_of(inner))

    def _number_of(self, child: Any) -> pl.Expr:
        """Translate an operand of arithmetic, which is done in double precision."""
        term = self._as(self.term(child), "number")
        if term.kind != "number":
            self.refuse(f"arithmetic takes numbers, found {_a(term.kind)}", types=True)
        return term.expression.cast(pl.Float64)

    def _number(self, children: list[Any]) -> Term:
        text = str(children[0])
        whole = re.fullmatch("-?[0-9]{1,19}", text) is not None and abs(int(text)) < 2**63
        value = int(text) if whole else float(text)
        if value in (float("inf"), float("-inf")):
            self.refuse(f"the number {text[:20]} is too large")
        return Term("number", pl.lit(value), value, is_leaf=True)

    def _text(self, children: list[Any]) -> Term:
        value = str(children[0])[1:-1].replace("''", "'").encode("utf-8", "replace").decode()
        return Term("text", pl.lit(value, dtype=pl.String), value, is_leaf=True)

    def _boolean(self, children: list[Any]) -> Term:
        return Term("boolean", pl.lit(children[0].type == "TRUE"), is_leaf=True)

    def _null(self, _: list[Any]) -> Term:
        return Term("null", pl.lit(None))

    def _typed_literal(self, children: list[Any]) -> Term:
        name, text = children
        if name.lower() not in ("date", "timestamp"):
            self.refuse(f"expected DATE or TIMESTAMP before text in quotes, found {str(name)[:20]!r}")
        moment: str = self._text([text]).literal
        return self._moment(moment)

    def _column(self, children: list[Any]) -> Term:
        token = children[0]
        quoted = token.type == "QUOTED"
        name = token[1:-1].replace('""', '"') if quoted else str(token)
        if name not in self._table.columns:
            self.refuse(
                f"no column {name[:SHOWN]!r} in the item table; found {listed(self._table.columns)}"
                + (" (put text in single quotes)" if quoted else "")
            )
        if name not in self.columns:
            self.columns.append(name)
        return _column_term(name, self._table.schema[name])

    def _call(self, children: list[Any]) -> Term:
        name, terms = children[0].lower(), [self._value(child) for child in children[1:]]
        if name in _LIST_FUNCTIONS:
            return self._list_call(name, terms)
        if name == "coalesce" and terms:
            terms = self._common(name, terms)
            return self._stored(terms[0].kind, pl.coalesce([term.expression for term in terms]))
        if name not in FUNCTIONS:
            self.refuse(f"no function {str(name)[:40]!r}; expected one of {_KNOWN_FUNCTIONS}")
        kinds, result, build = FUNCTIONS[name]
        terms = [self._as(term, kind) for term, kind in zip(terms, kinds, strict=False)] + terms[len(kinds) :]
        if [term.kind for term in terms] != list(kinds):
            found = ", ".join(term.kind for term in terms) or "nothing"
            self.refuse(f"{name}: expected {name}({', '.join(kinds)}), found {found}", types=True)
        expressions = [term.expression for term in terms]
        if name in ("ceil", "floor", "round"):
            expressions = [expressions[0].cast(pl.Float64)]
        return self._stored(result, build(*expressions))

    def _list_call(self, name: str, terms: list[Term]) -> Term:
        if not terms or not terms[0].kind.startswith("list of "):
            self.refuse(f"{name}: expected a column of lists", types=True)
        values = terms[0]
        if name == "array_length" and len(terms) == 1:
            return self._stored("number", values.expression.list.len().cast(pl.Int64))
        kind = values.kind.removeprefix("list of ")
        if name == "array_length" or len(terms) != 2 or terms[1].kind not in (kind, "null"):
            wanted_kinds = values.kind if name == "array_length" else f"{values.kind}, {kind}"
            self.refuse(f"{name}: expected {name}({wanted_kinds})", types=True)
        if terms[1].kind == "null":
            return Term("boolean", pl.lit(None, dtype=pl.Boolean))
        wanted = terms[1].expression.cast(pl.Float64) if kind == "number" else terms[1].expression
        found = values.expression.list.contains(wanted, nulls_equal=False)
        return self._stored("boolean", pl.when(wanted.is_not_null()).then(found))


def _column_term(name: str, dtype: pl.DataType) -> Term:
    """Return a column with its kind, cast to the type that represents this kind."""
    column, kind = pl.col(name), _kind(dtype)
    if kind == "text":
        column = column.cast(pl.String)
    elif kind == "number" and not dtype.is_integer():
        column = column.cast(pl.Float64) if dtype.is_decimal() else column
        column = column.fill_nan(None)
    elif kind == "time":
        if isinstance(dtype, pl.Datetime) and dtype.time_zone:
            column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        column = column.cast(pl.Datetime("us"))
    elif kind == "list of number":
        column = column.cast(pl.List(pl.Float64))
    elif kind == "list of text":
        column = column.cast(pl.List(pl.String))
    return Term(kind, column, is_leaf=True)


def _kind(dtype: pl.DataType) -> str:
    if isinstance(dtype, pl.List):
        inner = _kind(dtype.inner)  # type: ignore[arg-type]  # always an instance in a schema
        return f"list of {inner}" if inner in ("text", "number", "boolean") else "other"
    if dtype.is_numeric():
        return "number"
    kinds: list[tuple[str, tuple[type[pl.DataType], ...]]] = [
        ("text", (pl.String, pl.Categorical, pl.Enum)),
        ("boolean", (pl.Boolean,)),
        ("time", (pl.Date, pl.Datetime)),
        ("null", (pl.Null,)),
    ]
    return next((kind for kind, types in kinds if isinstance(dtype, types)), "other")


def _with_not(children: list[Any]) -> tuple[Any, bool, list[Any]]:
    """Split `left [NOT] rest...`."""
    negative = isinstance(children[1], Token) and children[1].type == "NOT"
    return children[0], negative, children[2 if negative else 1 :]


def _balanced(join: Callable[[pl.Expr, pl.Expr], pl.Expr], parts: Sequence[pl.Expr]) -> pl.Expr:
    """Join expressions as a balanced tree: polars walks expressions recursively."""
    found = list(parts)
    while len(found) > 1:
        found = [reduce(join, found[at : at + 2]) for at in range(0, len(found), 2)]
    return found[0]


def _a(kind: str) -> str:
    if kind == "other":
        return "a value of an unsupported type"
    return kind if kind in ("text", "null") or kind.startswith("list") else f"a {kind}"
