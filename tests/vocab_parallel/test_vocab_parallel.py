"""Vocabulary-parallel: 2 and 4 processes with a slice of the head each do what one does with the whole.

Problems drawn at random over everything the loss takes (helpers/problems.py), cut at random places, hold every option,
teacher and engine against the rules of `agree`, in float64 and narrower. The rest is what a single
process does not have: DTensors, meshes, collectives, and processes that do not fit together.
"""

import communication
import confident
import meshes
import pytest
import sliced
import torch
from agree import agree
from cases import gradients, make, relative, student, teacher
from communication import NUMBERS, Step
from own_divergences import Doubled, Hellinger
from problems import drawn
from processes import Processes
from teachers import ENGINES, KINDS, loss_of

from kdfast import JSD, AlphaBeta, ForwardKL, Head, SkewKL, SymmetricKL, fused_kd_loss
from kdfast.frontend.agreement import kind_of_call
from kdfast.inputs import Options
from kdfast.kernels.online_softmax import STATE, TERMS


@pytest.fixture(scope="module")
def pool():
    pool = Processes(4)
    yield pool
    pool.close()


NUMBER = {"reference": 15, "torch": 40, "triton_chunked": 8, "triton_tiled": 8}  # of problems


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", NUMBER)
def test_random_problems(pool, engine, ranks):
    # 2e-5 in float32 as for the kernels, whose one pass this is; the single process's torch engine takes two
    @drawn(NUMBER[engine], derandomize=True)
    def one(problem):
        agree(problem, engine, sliced.run(pool, ranks, problem, engine), single=2e-5)

    one()


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("engine", NUMBER)
def test_random_problems_long(pool, engine, ranks):
    @drawn(10 * NUMBER[engine], print_blob=True)
    def one(problem):
        agree(problem, engine, sliced.run(pool, ranks, problem, engine), single=2e-5)

    one()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_teacher(pool, engine, kind):
    """A slice of one block and a bit, one that the truncated teacher's vocabulary ends in, and one past its end."""
    options = {"divergence": "skew_kl", "reduction": "sum"}
    case = make()
    expected, metrics = loss_of(fused_kd_loss, case, kind, engine="reference", return_metrics=True, **options)
    expected.backward()
    parts = pool.run(3, meshes.of_kind, kind, engine, [0, 70, 97, 101], **options)
    for loss, found, _ in parts:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(tuple(found), tuple(metrics), rtol=1e-6, atol=1e-7, equal_nan=True)
    for name, gradient in gradients(case).items():
        found = [part[name] for _, _, part in parts]
        found = [torch.cat(found)] if name in ("W", "b") else found
        for each in found:
            torch.testing.assert_close(each, gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


ONES_OWN = [(engine, divergence) for engine in ENGINES[:2] for divergence in (Hellinger(0.7), Doubled())]
PARAMETERS = [(engine, divergence) for engine in ENGINES for divergence in (AlphaBeta(0.2, 0.7), SymmetricKL(0.9))]


@pytest.mark.parametrize(("engine", "divergence"), ONES_OWN + PARAMETERS, ids=str)
@pytest.mark.parametrize("kind", ["projected", "tempered"])
def test_divergences_with_parameters_and_ones_own(pool, engine, divergence, kind):
    case = make()
    expected = loss_of(fused_kd_loss, case, kind, engine="reference", divergence=divergence)
    expected.backward()
    parts = pool.run(2, meshes.of_kind, kind, engine, [0, 70, 101], divergence=divergence)
    for loss, _, found in parts:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(found["hs"], case.hs.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([found["W"] for *_, found in parts]), case.W.grad, rtol=1e-9, atol=1e-12)


EDGES = [0, 70, 101]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_the_callers_own(pool, engine, reduction):
    for kind in ("projected", "head", "bucket"):
        pool.run(2, meshes.own_gradients, kind, engine, EDGES, reduction=reduction)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_of_inference_mode(pool, engine, reduction):
    cases = [(kind, ()) for kind in KINDS if kind != "truncated"] + [("projected", ("W", "b")), ("head", ("hs",))]
    for kind, frozen in cases:
        for expected, found in pool.run(2, meshes.of_inference_mode, kind, engine, EDGES, frozen, reduction=reduction):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["projected", "head", "bucket"])
def test_transforms_are_right_on_the_reference_and_refused_elsewhere(pool, kind):
    case = make()
    case.W, case.b = case.W.detach(), case.b.detach()

    def alone(hidden):
        case.hs = hidden
        return loss_of(fused_kd_loss, case, kind, engine="reference")

    expected = meshes.transforms_of(alone)
    for found in pool.run(2, meshes.transformed, kind, EDGES):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"student: Head.hidden goes through torch.func.jvp .* engine='reference'"):
        pool.run(2, meshes.transformed, kind, EDGES, "torch")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", ["none", "sharded", "replicated"])
def test_dtensors(pool, engine, mask):
    """W, b sharded by torch on the mesh that is passed; replicated hidden states get a replicated gradient."""
    options = {"ce_weight": 0.5, "divergence": "jsd"}
    if mask != "none":
        options["kd_vocab_mask"] = torch.arange(101) % 3 > 0
    for loss, found in pool.run(4, meshes.sharded, 3, engine, mask == "sharded", **options):
        case = make(seed=3)
        expected = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, engine="reference", **options)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
        for name, gradient in gradients(case).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("wrapper", ["by hand", "fsdp2"])
def test_two_by_two(pool, wrapper):
    """Vocabulary × data on one mesh, the data's gradients averaged by FSDP2 or by hand: all rows in one process."""
    expected, gradients = meshes.alone()
    for loss, found in pool.run(4, meshes.two_by_two, wrapper):
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(torch.__version__ < "2.9", reason="over gloo, its FSDP2 adds float32 gradients and takes no mean")
def test_two_by_two_in_single_precision(pool):
    """|ours − truth| ≤ |one process in float32 − truth| + 2e-6 of the gradient's norm, thirty-two roundings."""
    truth_loss, truth = meshes.alone()
    alone_loss, alone = meshes.alone(torch.float32)
    for loss, found in pool.run(4, meshes.two_by_two, "fsdp2", torch.float32):
        assert abs(loss - truth_loss) <= abs(alone_loss - truth_loss) + 2e-6 * truth_loss
        for name, gradient in truth.items():
            allowed = (alone[name].double() - gradient).norm() + 2e-6 * gradient.norm()
            assert (found[name].double() - gradient).norm() <= allowed, name


@pytest.mark.parametrize("ranks", [2, 4])
def test_sequence_sharded_rows_are_rows(pool, ranks):
    """Each process with some rows and the whole head: losses and gradients add up, divided by all processes' items."""
    case = make(n=24)
    options = {"ce_weight": 0.5, "engine": "torch", "num_items_in_batch": (case.labels >= 0).sum()}
    expected = fused_kd_loss(student(case), teacher(case, "projected"), case.labels, **options)
    expected.backward()
    parts = pool.run(ranks, meshes.sequence_sharded)
    torch.testing.assert_close(sum(loss for loss, _ in parts), expected.detach(), rtol=1e-12, atol=0)
    for name, gradient in gradients(case).items():
        found = [part[name] for _, part in parts]
        found = torch.cat(found) if name == "hs" else sum(found)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("engine", ["torch", "triton_chunked", "triton_tiled"])
def test_gradients_of_logits_in_16_bits(pool, engine, divergence):
    """What a GPU does: two roundings of float16 off, 1e-3; dW is 3–9% off where rows are not made orthogonal first."""
    for found, expected in pool.run(2, meshes.as_on_a_gpu, engine, divergence):
        for name, a, b in zip(("hidden", "teacher's hidden", "W"), found, expected, strict=True):
            assert relative(a, b) < 1e-3, (name, relative(a, b))


@pytest.mark.parametrize("engine", ["torch", "triton_chunked", "triton_tiled"])
def test_confident_rows(pool, engine):
    """As tests/engines/test_confident_rows.py: an entry with most of the mass is in one process's slice."""
    for divergence in ("forward_kl", "reverse_kl", SkewKL(0.9), JSD(0.5), "total_variation"):
        problem = (confident.draw("none", 5.0), "projected", divergence)
        parts = pool.run(
            2, confident.row_gradients, *problem, torch.float32, engine, edges=[0, 61, confident.VOCAB], temperature=0.5
        )
        confident.check(parts[0], *problem, temperature=0.5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(pool, reduction):
    for once, twice in pool.run(2, meshes.twice, reduction):
        for first, both in zip(once, twice, strict=True):
            torch.testing.assert_close(both, 2 * first, rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "triton_tiled"])
def test_compiled_in_one_graph(pool, engine):
    for (eager, eager_gradients), (compiled, compiled_gradients) in pool.run(2, meshes.compiled, engine):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)
        torch.testing.assert_close(compiled_gradients, eager_gradients, rtol=1e-12, atol=0)


# what is wrong, and what every process says; two each but where a mesh has four
WRONG = {
    "gap": "vocab_start: the slices leave a gap at id 51 .*Rank 1's vocab_start should be 51",
    "overlap": "vocab_start: the slices overlap at id 50 ",
    "other rows": "student: Head.hidden is not the same on rank 0 and rank 1 of process_group",
    "other labels": "labels or anchor_targets is not the same on rank 0 and rank 1",
    "fewer rows": "the number of rows of student: Head.hidden is not the same on rank 0 and rank 1",
    "other options": "a number among the options, .* is not the same on rank 0 and rank 1",
    "label": "labels contains 101; expected ids from 0 to 100",
    "no start": "vocab_start is None with a plain student: Head.weight",
    "no group": "vocab_start=.* without process_group",
    "group": "process_group is str; expected a torch.distributed.ProcessGroup or a DeviceMesh",
    "start": "vocab_start=-1; expected an int ≥ 0",
    "valid_vocab": "valid_vocab=102; expected 1 to the head's 101 rows",
    "teacher": "teacher: its slices have other ids than the student's .*rank 0 50 from 0, of 51 from 0",
    "teacher vocabulary": "teacher: Head.weight has a vocabulary of 90 and the student's head 101",
    "kind of call": "the kind of call .* is not the same on rank 0 and rank 1",
    "other weights": "token_weights or kd_token_weights is not the same on rank 0 and rank 1",
    "other teacher": "the teacher's hidden states is not the same on rank 0 and rank 1",
    "one refuses": "token_weights requires grad|rank 1 of process_group refuses its arguments",
    "bias of one": "Head.bias is .*expected|rank 1 of process_group refuses its arguments",
    "mask": r"kd_vocab_mask is \(101,\); expected \(5[01],\)",
    "mask of one": "the kind of call .* is not the same on rank 0 and rank 1",
    "mask of nothing": "kd_vocab_mask is False at every id that both sides have",
    "mesh of two": r"process_group is a DeviceMesh of 2 dimensions \('data', 'vocab'\)",
    "mask without mesh": "kd_vocab_mask is a DTensor; expected a plain tensor, or process_group=",
    "data mesh": "student: Head.weight is a DTensor on .*not on the group passed as process_group",
    "no mesh": "student: Head.weight is a DTensor; expected a plain tensor. An FSDP-sharded head",
    "both starts": "vocab_start=0 on rank 1 with student: Head.weight a DTensor whose slice starts at 51",
    "teacher dtensor": "teacher: its slices have other ids than the student's",
    "placement": r"student: Head.weight is a DTensor placed .*1\); expected Shard\(0\)",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_an_error_on_every_process(pool, what):
    """With KDFAST_CHECK=1: the group may know these slices from another test."""
    ranks = 4 if what in list(WRONG)[list(WRONG).index("mesh of two") :] else 2
    for said in pool.run(ranks, meshes.wrong, what):
        with pytest.raises(ValueError, match=WRONG[what]):
            raise ValueError(said)


def test_the_first_call_of_a_set_of_slices_is_compared_and_with_kdfast_check_every_one(pool):
    """An error on one is an error on all, after which they compare again; a later call does not communicate."""
    first, second = pool.run(2, meshes.first_and_later_calls)
    refuses = "ValueError: rank 1 of process_group refuses its arguments"
    differ = "ValueError: labels or anchor_targets is not the same on rank 0 and rank 1"
    expected = {
        "refused at the first": (refuses, "ValueError: vocab_start is None", 1),
        "refused by the checks": (refuses, "ValueError: token_weights requires grad", 2),
        "other labels": (differ, differ, 2),
        "right": (None, None, 2),
        "again": (None, None, 0),
        "another number": (None, None, 0),
        "another kind": (None, None, 2),
        "right, checked": (None, None, 2),
        "other labels, checked": (differ, differ, 2),
        "right once more": (None, None, 2),
    }
    for name, (of_first, of_second, exchanges) in expected.items():
        for (said, count), wanted in ((first[name], of_first), (second[name], of_second)):
            assert count == exchanges, name
            assert said is wanted or said.startswith(wanted), (name, said)


def test_a_group_that_is_gone_is_forgotten(pool):
    for there, gone in pool.run(4, meshes.groups_remembered):
        assert gone == there - 1


class TestCollectives:
    """How many, how large, and when they are waited for; N=24 rows, in float32."""

    @pytest.mark.parametrize(("divergence", "gathers"), [("forward_kl", 1), ("reverse_kl", 1), ("jsd", 2)])
    @pytest.mark.parametrize("engine", ["torch", "triton_chunked"])
    def test_a_chunk(self, pool, engine, divergence, gathers):
        scratch = 8 * 2 * 2 * 4 * (128 if engine == "triton_chunked" else 51)  # 8 rows, of two buffers and two sides
        for events, calls in pool.run(2, meshes.collectives_of, engine, 24, scratch, divergence=divergence):
            kinds = [kind for kind, _, _ in calls]
            assert kinds.count("all_gather") == 3 * gathers
            assert kinds.count("all_reduce") == 3
            sums = [size for kind, size, _ in calls if kind == "all_reduce"]
            assert sums == [2 * 12 * 4 * rows for rows in active_chunks(engine)]
            # between a collective's start and its wait there are products, but for the first chunk's and the last's
            overlapped = {kind: products_under_way(events, kind) for kind in ("all_gather", "all_reduce")}
            alone = [0] if gathers == 1 else [0, 5]  # the first chunk's states, the last's terms
            assert overlapped["all_gather"] == [i not in alone for i in range(3 * gathers)]
            assert overlapped["all_reduce"] == [True, True, False]

    def test_statistics_of_a_row(self, pool):
        """Fifteen numbers of every engine, and seven of a second pass: three chunks of eight rows."""
        assert (STATE.value, TERMS.value) == (NUMBERS, 7)  # docs/distributed.md: 60 and 28 bytes
        for engine, numbers in (("torch", NUMBERS), ("triton_chunked", STATE.value)):
            scratch = 8 * 2 * 2 * 4 * (128 if engine == "triton_chunked" else 51)
            for _, calls in pool.run(2, meshes.collectives_of, engine, 24, scratch):
                gathered = [size for kind, size, _ in calls if kind == "all_gather"]
                assert gathered == [numbers * 4 * rows for rows in active_chunks(engine)]

    @pytest.mark.parametrize(("divergence", "gathers"), [("forward_kl", 1), ("jsd", 2)])
    def test_tiled(self, pool, divergence, gathers):
        """All rows at once: the sum of dX is one."""
        for _, calls in pool.run(2, meshes.collectives_of, "triton_tiled", 24, None, divergence=divergence):
            kinds = [kind for kind, _, _ in calls]
            assert kinds == ["all_gather"] * gathers + ["all_reduce"]


def active_chunks(engine):
    """Rows of the chunks: the torch engine drops the five that are ignored before it cuts the rest."""
    return [7, 7, 5] if engine == "torch" else [8, 8, 8]


def products_under_way(events, kind):
    """Of each collective of a kind, in order, whether there are products between its start and its wait."""
    found = []
    for i, event in enumerate(events):
        if event[0] == kind:
            until = events.index(("wait", event[1]), i)
            found.append(any(each[0].startswith("product") for each in events[i:until]))
    return found


def test_bytes_are_those_that_the_documents_count_with(pool):
    """Counted on processes, next to the formula and to gathering the logits, which the reference does."""
    for x in (Step(40, 300, 16, 2), Step(40, 301, 16, 4)):
        formula = communication.predicted(x)
        for found in pool.run(x.ranks, meshes.communicated, x):
            assert found["ours"]["bytes"] == pytest.approx(formula["ours"], rel=1e-9)
            padded = formula["gathered logits"] * -(-x.vocab // x.ranks) * x.ranks / x.vocab  # slices of one size
            assert formula["gathered logits"] <= found["gathered logits"]["bytes"] <= padded


def test_the_kind_of_a_call_is_what_decides_its_collectives():
    def kind(labels_dtype=torch.int64, dtype=torch.float32, **scales):
        head = Head(torch.zeros(2, 4, dtype=dtype), torch.zeros(7, 4, dtype=dtype), **scales)
        options = Options(**{**dict.fromkeys(Options.names(), 0.0), "divergence": ForwardKL()})
        return kind_of_call(head, None, torch.zeros(2, dtype=labels_dtype), options)

    assert kind(logit_scale=2) == kind(logit_scale=3.0), "an int that changes is no constant of a graph"
    assert kind(softcap=5) == kind(softcap=6) != kind()
    assert kind(torch.int32) == kind(), "one process with other integers must not be alone with its comparison"
    assert kind(dtype=torch.float64) != kind()
