"""What the operators behind the fused engines are called with, for a case of teachers.py."""

import inspect
from dataclasses import fields

from cases import student
from teachers import sources

from kdfast import fused_kd_loss
from kdfast.divergences import get_divergence
from kdfast.frontend.build import build_problem
from kdfast.frontend.vocab_parallel import localize
from kdfast.inputs import Options
from kdfast.ops.problem import Problem


def problem(case, kind, **options):
    """Return the operators' arguments for a case."""
    source, own = sources(case, kind)
    return arguments(student(case), source, case.labels, **{"ce_weight": 0.5} | own | options)


def arguments(*sources, **options):
    parameters = inspect.signature(fused_kd_loss).parameters
    given = {name: parameters[name].default for name in Options.names()} | options
    given["divergence"] = get_divergence(given["divergence"])
    problem, _ = build_problem(localize(*sources, Options(**given)))
    return [getattr(problem, field.name) for field in fields(Problem)]
