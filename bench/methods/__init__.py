"""Every contender, one small adapter each; what is not installed or cannot do a case is listed as such."""

from . import cross_entropy, eager, fla, floors, liger, ours, torchtune, trl
from .method import Method, Run

METHODS: list[Method] = [
    method for module in (floors, ours, eager, trl, liger, torchtune, fla, cross_entropy) for method in module.METHODS
]
BY_NAME = {method.name: method for method in METHODS}
__all__ = ["BY_NAME", "METHODS", "Method", "Run"]
