"""A Jinja sandbox that a template cannot leave, hang or blow up.

jinja2's ImmutableSandboxedEnvironment keeps templates from reaching Python's internals, but not from looping for hours
or building gigabytes. Here every loop iteration, call and filter spends from a budget of steps and checks a limit of
CPU time, and every operation that can make something larger than what it was given is either bounded by the size of its
result before the work is done, or not offered. CPU time is that of the rendering thread, so a busy machine refuses no
honest template.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer


@dataclass(frozen=True, slots=True)
class RenderBounds:
    """What one rendering may use up."""

    max_steps: int = 1_000_000  # loop iterations, calls and filters
    max_cpu_s: float = 2.0
    max_chars: int = 1 << 23  # of the output, and of every string and list on the way


class TemplateBoundExceeded(TemplateRuntimeError):
    """A rendering used up one of its bounds."""


class Budget:
    """What is left of one rendering's bounds."""

    def __init__(self, bounds: RenderBounds) -> None:
        self.bounds = bounds
        self._steps = self._output = self._made = 0
        self._end_s = time.thread_time() + bounds.max_cpu_s

    def spend_step(self) -> None:
        self._steps += 1
        if self._steps > self.bounds.max_steps:
            raise TemplateBoundExceeded(f"more than {self.bounds.max_steps} steps")
        if time.thread_time() > self._end_s:
            raise TemplateBoundExceeded(f"more than {self.bounds.max_cpu_s} s of CPU time")

    def spend_output(self, num_chars: int) -> None:
        self._output += num_chars
        if self._output > self.bounds.max_chars:
            raise TemplateBoundExceeded(f"an output of more than {self.bounds.max_chars} characters")

    def check_weight(self, *values: object) -> int:
        """Refuse containers that hold more than ``max_chars`` items and characters at any depth.

        An item counts once for each way that leads to it, since printing or comparing visits it as often.
        """
        weight, stack = 0, list(values)
        while stack:
            value = stack.pop()
            weight += 1 + (len(value) if isinstance(value, str) else 0)
            if isinstance(value, dict):
                stack.extend(value)
                stack.extend(value.values())
            elif isinstance(value, list | tuple):
                stack.extend(value)
            if weight > self.bounds.max_chars or len(stack) > self.bounds.max_chars:
                raise TemplateBoundExceeded(f"a value of more than {self.bounds.max_chars} characters and items")
        return weight

    def check_size(self, size: int) -> None:
        """Refuse a value of ``size`` characters or items; small values are free, large ones add up."""
        if size > self.bounds.max_chars:
            raise TemplateBoundExceeded(f"a value of more than {self.bounds.max_chars} characters or items")
        if size > 1024:
            self._made += size
            if self._made > 16 * self.bounds.max_chars:
                raise TemplateBoundExceeded(
                    f"values of more than {16 * self.bounds.max_chars} characters or items in all"
                )


_BUDGET: ContextVar[Budget] = ContextVar("budget")

# widths and precisions that could make a large result of a small value: over 3 digits, or taken from an argument
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{4,}|\d*\.(\*|\d{4,}))")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\{|\d{4,}[^{}]*\})")

_STR_METHODS = frozenset(
    """capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier
    islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace
    rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper""".split()  # noqa: SIM905
)
_FILTERS = frozenset(
    """abs attr bool capitalize count d default dictsort e escape filesizeformat first float forceescape format groupby
    indent int items join last length list lower map max min reject rejectattr replace reverse round safe select
    selectattr sort string striptags sum title trim unique upper urlencode wordcount""".split()  # noqa: SIM905
)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. Compile with ``from_string``; render inside ``bounded()``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, bounds: RenderBounds, extensions: Sequence[str | type[Extension]]) -> None:
        # optimized would fold constant expressions while compiling, before any bound applies
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, cache_size=0)
        self._bounds = bounds
        self.filters = {name: _counted_filter(self.filters[name]) for name in _FILTERS if name in self.filters}
        self.filters["indent"] = _indent
        self.filters["join"] = _join
        self.filters["replace"] = _replace
        self.filters["format"] = _percent
        self.filters["_moestro_iterate"] = _iterate
        self.filters["_moestro_weigh"] = _weigh
        self.globals["namespace"] = _OpaqueNamespace
        self.filters["_moestro_concat"] = _concat
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]

    @contextmanager
    def bounded(self) -> Iterator[Budget]:
        """Give everything rendered inside the block one budget."""
        budget = Budget(self._bounds)
        token = _BUDGET.set(budget)
        try:
            yield budget
        finally:
            _BUDGET.reset(token)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bounded = _Bounding().visit(tree)
        assert isinstance(bounded, nodes.Template)
        return bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, int | float | bytes | type):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend_step()
        if operator == "+" and _sized(left) and _sized(right):
            budget.check_size(len(left) + len(right))
            if not isinstance(left, str):
                budget.check_weight(left, right)
        elif operator == "*" and (_sized(left) or _sized(right)):
            value, times = (left, right) if _sized(left) else (right, left)
            budget.check_size(
                (len(value) if isinstance(value, str) else budget.check_weight(value)) * max(0, int(times))
            )
        elif operator == "*":
            _check_numbers(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and (abs(left) > 2**32 or not 0 <= right <= 64):
                raise TemplateBoundExceeded("a power of more than 2**32 ** 64")
        elif operator == "%" and isinstance(left, str):
            return _percent(left, *(right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = _BUDGET.get()
        budget.spend_step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join":
            return _join(args[0], owner) if len(args) == 1 else owner.join(*args)
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args, **kwargs)
        budget.check_weight(*args, *kwargs.values())
        result = super().call(__context, __obj, *args, **kwargs)
        if _sized(result):
            budget.check_size(len(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None
        if getattr(value, "__name__", "") != "format":
            raise SecurityError("str.format_map is not available in chat templates")
        template = str(value.__self__)

        def bounded_format(*args: Any, **kwargs: Any) -> str:
            _check_format(template.replace("{{", "").replace("}}", ""), _WIDE_BRACES)
            _check_args((*args, *kwargs.values()), template.count("{"), len(template))
            return wrapper(*args, **kwargs)

        return bounded_format


class _OpaqueNamespace(Namespace):
    """A namespace whose text does not show what it holds: assignments to it could not be weighed."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Bounding(NodeTransformer):
    """Rewrites the template so that loops and everything built pass through the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        iterable: nodes.Expr = node.iter  # type: ignore[assignment]  # jinja2 declares it a plain Node
        node.iter = _filtered(iterable, "_moestro_iterate")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), "_moestro_concat")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_moestro_weigh")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_moestro_weigh")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_moestro_weigh") if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _sized(value: object) -> bool:
    return isinstance(value, str | list | tuple)


def _length(value: object) -> int:
    """Characters that ``value`` has as text, near enough for a bound: exact for strings, a guess for the rest."""
    return len(value) if isinstance(value, str) else 32


def _weigh(value: Any) -> Any:
    budget = _BUDGET.get()
    budget.spend_step()
    budget.check_weight(value)
    return value


def _iterate(iterable: Any) -> Iterator[Any]:
    budget = _BUDGET.get()
    for item in iterable:
        budget.spend_step()
        yield item


def _concat(parts: tuple[Any, ...]) -> str:
    budget = _BUDGET.get()
    budget.spend_step()
    texts = [str(part) for part in parts]
    budget.check_size(sum(map(len, texts)))
    return "".join(texts)


def _counted_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, paid for. Lazy results (map, select, ...) are paid for item by item."""

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend_step()
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _iterate(result)
        if _sized(result):
            budget.check_size(len(result))
        return result

    return counted


def _join(value: Any, d: Any = "", attribute: str | None = None) -> str:
    budget = _BUDGET.get()
    budget.spend_step()
    separator, texts, size = str(d), [], 0
    for item in _iterate(value):
        if attribute is not None:
            item = item[attribute] if isinstance(item, dict) else ""
        text = str(item)
        size += len(text) + len(separator)
        if size > budget.bounds.max_chars:
            budget.check_size(size)
        texts.append(text)
    budget.check_size(size)
    return separator.join(texts)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    budget = _BUDGET.get()
    budget.spend_step()
    text, old, new = str(s), str(old), str(new)
    found = text.count(old)
    times = found if count is None or count < 0 else min(count, found)
    budget.check_size(len(text) + times * max(0, len(new) - len(old)))
    return text.replace(old, new, times)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    budget = _BUDGET.get()
    budget.spend_step()
    text = str(s)
    margin = width if isinstance(width, str) else " " * min(width, 1025)
    if len(margin) > 1024:
        raise TemplateBoundExceeded("an indent of more than 1024 characters")
    lines = text.splitlines() or [""]
    budget.check_size(len(text) + len(margin) * len(lines))
    rest = [margin + line if line or blank else line for line in lines[1:]]
    head = margin + lines[0] if first else lines[0]
    return "\n".join([head, *rest, *([""] if text.endswith("\n") else [])])


def _percent(value: Any, *args: Any, **kwargs: Any) -> str:
    _BUDGET.get().spend_step()
    template = str(value)
    _check_format(template.replace("%%", ""), _WIDE_PERCENT)
    _check_args((*args, *kwargs.values()), template.count("%"), len(template))
    return template % (kwargs or args)


def _check_format(template: str, wide: re.Pattern[str]) -> None:
    if wide.search(template):
        raise TemplateBoundExceeded("a format width or precision of more than 3 digits, or taken from an argument")


def _check_args(args: Iterable[Any], num_uses: int, num_chars: int) -> None:
    budget = _BUDGET.get()
    budget.check_size(num_chars + num_uses * max((1024 + _length(arg) for arg in args), default=0))


def _check_numbers(left: Any, right: Any) -> None:
    if any(isinstance(value, int) and abs(value) > 2**2048 for value in (left, right)):
        raise TemplateBoundExceeded("an integer of more than 2048 bits")
