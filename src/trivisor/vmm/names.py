"""Names for machines that were given none: readable, and almost always free at the first try."""

from __future__ import annotations

import random

_HOW = """
able bold brave brisk calm clear clever cool crisp deft eager early fair fast fine firm fond free fresh glad
grand happy hardy keen kind late light lively lucky merry mild neat noble plain proud quick quiet rapid ready sharp shy
sleek smart snug solid sound spry steady still sunny swift tame tidy vivid warm wise witty"""
_WHAT = """
adder alder ash aspen badger bear beech birch bison cedar crane crow dove eagle elder elm falcon fern finch fir
fox frog gecko goose hare hawk hazel heron holly ibex iris jay kite lark laurel lily linden lion lynx maple marten mole
moss newt oak olive orca osprey otter owl panda pine plover poplar puffin raven robin rowan seal sedge shrew sloe sparrow
stoat stork swan tern thrush tiger toad trout vole walnut weasel willow wolf wren yew zebra"""


def readable(attempt: int = 0) -> str:
    """Return a name such as "quiet-otter"; with a number after it from the second `attempt` on."""
    # Seeded by the system on every call: forked children must not all pick the same names.
    pick = random.SystemRandom()
    name = f"{pick.choice(_HOW.split())}-{pick.choice(_WHAT.split())}"
    return f"{name}-{pick.randrange(10, 10 ** (attempt + 2))}" if attempt else name
