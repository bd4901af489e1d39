"""Problems drawn at random over everything the loss takes, in combinations nobody thought of: helpers/problems.py.

Every engine against the reference, and the reference against helpers/oracle.py. A problem that fails is shrunk to a
simpler one and printed; to see it again, paste it: `agree(Problem(…), "torch")`. `make test` draws the same problems
every time, `make test-long` others, and prints how to draw a failing one again.
"""

import pytest
from agree import agree
from problems import drawn


@drawn(100, derandomize=True)
def test_reference(problem):
    agree(problem, "reference")


@drawn(100, derandomize=True)
def test_torch(problem):
    agree(problem, "torch")


@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
@drawn(25, derandomize=True)
def test_triton(engine, problem):
    agree(problem, engine)


@pytest.mark.long
@drawn(2000, print_blob=True)
def test_reference_long(problem):
    agree(problem, "reference")


@pytest.mark.long
@drawn(3000, print_blob=True)
def test_torch_long(problem):
    agree(problem, "torch")


@pytest.mark.long
@pytest.mark.parametrize("engine", ["triton_chunked", "triton_tiled"])
@drawn(300, print_blob=True)
def test_triton_long(engine, problem):
    agree(problem, engine)
