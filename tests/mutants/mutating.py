"""The mutants of a module: cosmic-ray's operators, and those it lacks for a table and for effects.

Cosmic-ray swaps operators, numbers and booleans. What a state machine can get wrong is rather a
statement, an argument or a table's entry that is missing, or another state in its place.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

Position = tuple[tuple[int, int], tuple[int, int]]

# In the order of their definition, so that each becomes the next of its kind.
ENUMS: Mapping[str, tuple[str, ...]] = {
    "State": (
        *("PARSED", "BOUND", "ENGINE_UP", "SERVING"),
        *("READY", "DEGRADED", "STOPPING", "STOPPED"),
    ),
    "Trigger": (
        *("BIND", "START_ENGINE", "SERVE", "BECOME_READY", "DEGRADE", "RECOVER"),
        *("RESTART_ENGINE", "STOP", "FINISH"),
    ),
    "When": ("BEFORE", "AFTER"),
}
OPPOSITES: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    **{ast.Is: ast.IsNot, ast.In: ast.NotIn, ast.Eq: ast.NotEq},
    **{ast.IsNot: ast.Is, ast.NotIn: ast.In, ast.NotEq: ast.Eq},
}
RETURN = "return None"
STATEMENTS = (
    *("simple_stmt", "decorator", "classdef", "funcdef"),
    *("if_stmt", "for_stmt", "while_stmt", "with_stmt", "try_stmt"),
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change to one module; `line` is where it is now, the rest names it for good."""

    module: str
    function: str
    operator: str
    was: str
    becomes: str
    line: int
    code: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.module, self.function, self.operator, self.was, self.becomes


class _Own(Operator):  # type: ignore[misc]  # cosmic-ray is untyped
    """Replaces or removes whole nodes; a subclass says which, and by what."""

    def places(self, node: Any) -> list[tuple[Any, str]]:
        """What to put in place of which descendants of `node`."""
        raise NotImplementedError

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        for place, _ in self.places(node):
            yield place.start_pos, place.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        place, text = self.places(node)[index]
        new = get_ast(place.get_first_leaf().prefix + text)
        if place is node:
            return new
        siblings = place.parent.children
        siblings[siblings.index(place)] = new
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class RemoveStatement(_Own):
    """An assignment, a call, a raise is left out; a function returns None."""

    def places(self, node: Any) -> list[tuple[Any, str]]:
        if node.type != "simple_stmt" or _holder(node, "funcdef") is None:
            return []
        statement = node.children[0]
        if statement.type in ("string", "strings", "keyword", "import_from"):
            return []
        if statement.type == "return_stmt":
            return [(statement, RETURN)]
        return [(statement, "pass")]


class RemoveItem(_Own):
    """A tuple, list or dictionary lacks an entry; a call, its last or a named argument."""

    def places(self, node: Any) -> list[tuple[Any, str]]:
        if node.type in ("testlist_comp", "dictorsetmaker") and not _comprehends(node):
            return [(node, rest) for rest in _without_one(node)]
        if node.type == "arglist":
            arguments = [child for child in node.children if child != ","]
            named = [a for a in arguments if a.type == "argument" or a is arguments[-1]]
            return [(node, _joined([[a] for a in arguments if a is not out])) for out in named]
        if node.type == "trailer" and len(node.children) == 3:  # "(", it, ")"
            lone = node.children[0] == "(" and node.children[1].type not in ("arglist", "argument")
            return [(node, "()")] if lone else []
        return []


class ReplaceMember(_Own):
    """Another state, trigger or moment than the one that is meant."""

    def places(self, node: Any) -> list[tuple[Any, str]]:
        if node.type not in ("power", "atom_expr") or len(node.children) < 2:
            return []
        members, attribute = ENUMS.get(node.children[0].get_code().strip(), ()), node.children[1]
        name = attribute.get_code().strip().removeprefix(".")
        if name not in members:
            return []
        return [(attribute, "." + members[(members.index(name) + 1) % len(members)])]


class ReplaceString(_Own):
    """Another text: a name that is misspelt, a message that says something else."""

    def places(self, node: Any) -> list[tuple[Any, str]]:
        if node.type == "string" and node.parent.type != "simple_stmt":
            return [(node, f"{node.value[0]}XX{node.value[1:]}")]
        if node.type == "fstring":
            text = node.get_code(include_prefix=False)
            return [(node, f"{text[:2]}XX{text[2:]}")]
        return []


class ReplaceIn(_Own):
    """`in` and `not in`, which cosmic-ray leaves alone."""

    def places(self, node: Any) -> list[tuple[Any, str]]:
        if node.type != "comparison":
            return []
        words = [(child, " ".join(child.get_code().split())) for child in node.children[1::2]]
        other = {"in": "not in", "not in": "in"}
        return [(child, other[word]) for child, word in words if word in other]


class ReplaceGuard(_Own):
    """A lambda that says True."""

    def places(self, node: Any) -> list[tuple[Any, str]]:
        return [(node.children[-1], "True")] if node.type == "lambdef" else []


OWN = (RemoveStatement, RemoveItem, ReplaceMember, ReplaceString, ReplaceIn, ReplaceGuard)


def mutants_of(
    module: str, code: str, operators_out: str, lines_out: str, only: str = ""
) -> Iterator[Mutant]:
    """The mutants of a module, without operators and without statements that match these.

    `only` is searched in `module function operator`, before the mutant is made, which takes time.
    """
    tree = get_ast(code)
    nodes = list(ast_nodes(tree))
    skipped = {id(inner) for node in nodes for outer in _types(node) for inner in ast_nodes(outer)}
    seen = {_meaning(code)}
    for name, operator in _operators(operators_out):
        sites = [(node, at) for node in nodes for at in operator().mutation_positions(node)]
        for occurrence, (node, ((line, _), _)) in enumerate(sites):
            if id(node) in skipped or re.search(lines_out, _statement(node)):
                continue
            function = _path(node)
            if not re.search(only, f"{module} {function} {name}"):
                continue
            mutated = mutate_code(code, operator(), occurrence)
            if _is_new(mutated, seen):
                was, becomes = _difference(code, mutated)
                yield Mutant(module, function, name, was, becomes, line, mutated)


def _operators(out: str) -> Iterator[tuple[str, type[Operator]]]:
    provider = OperatorProvider()
    theirs = {name: provider[name] for name in provider if not name.startswith("Variable")}
    for name, operator in {**theirs, **{own.__name__: own for own in OWN}}.items():
        if not re.search(out, name):
            yield name, operator


def _is_new(mutated: str, seen: set[str]) -> bool:
    """Whether it compiles, and is neither the module itself nor a mutant that was there before."""
    try:
        compile(mutated, "mutant", "exec")
    except SyntaxError:
        return False
    meaning = _meaning(mutated)
    new = meaning not in seen
    seen.add(meaning)
    return new


class _Plain(ast.NodeTransformer):
    """`not not x` is x, and `not x is y` is `x is not y`: several operators make the same."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        inner = node.operand
        if not isinstance(node.op, ast.Not):
            return node
        if isinstance(inner, ast.UnaryOp) and isinstance(inner.op, ast.Not):
            return inner.operand
        if isinstance(inner, ast.Compare) and len(inner.ops) == 1:
            opposite = OPPOSITES.get(type(inner.ops[0]))
            return ast.Compare(inner.left, [opposite()], inner.comparators) if opposite else node
        return node


def _meaning(code: str) -> str:
    return ast.dump(_Plain().visit(ast.parse(code)))


def _types(node: Any) -> Iterator[Any]:
    """The annotations below `node`: nothing evaluates them."""
    if node.type == "annassign":
        yield node.children[1]
    elif node.type == "tfpdef":
        yield node.children[2]
    elif node.type == "funcdef" and node.annotation is not None:
        yield node.annotation


def _statement(node: Any) -> str:
    """The text of the simple statement, or of the head of the compound one, that `node` is in."""
    while node.parent is not None and node.type not in STATEMENTS:
        node = node.parent
    text: str = node.get_code(include_prefix=False)
    return text if node.type == "simple_stmt" else text.partition("\n")[0]


def _holder(node: Any, *kinds: str) -> Any:
    while node is not None and node.type not in kinds:
        node = node.parent
    return node


def _path(node: Any) -> str:
    """The dotted name of the function or class that `node` is in; of a module's own code, ""."""
    names: list[str] = []
    while (node := _holder(node, "funcdef", "classdef")) is not None:
        names.insert(0, node.name.value)
        node = node.parent
    return ".".join(names)


def _comprehends(node: Any) -> bool:
    return any("comp_for" in child.type for child in node.children)


def _without_one(node: Any) -> Iterator[str]:
    """The entries of a tuple, list or dictionary without each of them in turn."""
    entries: list[list[Any]] = [[]]
    for child in node.children:
        if child == ",":
            entries.append([])
        else:
            entries[-1].append(child)
    entries = [entry for entry in entries if entry]
    for out in entries:
        yield _joined([entry for entry in entries if entry is not out])


def _joined(entries: list[list[Any]]) -> str:
    """A comma after each: what is left of a pair stays a tuple."""
    return "".join("".join(part.get_code() for part in entry) + "," for entry in entries).strip()


def _difference(code: str, mutated: str) -> tuple[str, str]:
    """The lines that differ, each side as one line of text."""
    sides: dict[str, list[str]] = {"-": [], "+": []}
    lines = difflib.unified_diff(code.splitlines(), mutated.splitlines(), n=0, lineterm="")
    for line in list(lines)[2:]:
        if line[0] in sides:
            sides[line[0]].append(line[1:].strip())
    return " ".join(sides["-"]), " ".join(sides["+"])
