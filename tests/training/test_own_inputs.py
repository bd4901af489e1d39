"""A teacher that reads ids of its own: values and gradients from whole logits, row by row, and what does not fit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import relative
from tiny_models import image_batch, tiny, tiny_vision

from kdfast.training import RECIPES, DistillationModel
from kdfast.training.config import KDConfig
from kdfast.training.initialization.calibration import Calibration

TAU, KD_WEIGHT = 1.7, 0.6
RECIPE_NAMES = ["teacher_head", "compressed_head", "projector", "projector_fixed", "probe"]


def own_batch(seed=0, V=67, own_V=67):
    """4 rows of other lengths than the teacher's, padded left and right, −100 and no position here and there."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n, V):
        return torch.randint(3, V, (n,), generator=generator)

    spans = [((0, 9), (0, 12)), ((0, 6), (3, 11)), ((2, 9), (1, 6)), ((3, 7), (0, 4))]  # the student's, the teacher's
    batch = {
        "input_ids": torch.zeros(4, 9, dtype=torch.long),
        "teacher_input_ids": torch.zeros(4, 12, dtype=torch.long),
        "teacher_positions": torch.full((4, 9), -1),
        "labels": torch.full((4, 9), -100),
    }
    for prefix in ("", "teacher_"):
        batch[f"{prefix}attention_mask"] = torch.zeros_like(batch[f"{prefix}input_ids"])
    for b, (own, theirs) in enumerate(spans):
        for prefix, (start, stop), size in (("", own, V), ("teacher_", theirs, own_V)):
            batch[f"{prefix}input_ids"][b, start:stop] = draw(stop - start, size)
            batch[f"{prefix}attention_mask"][b, start:stop] = 1
        batch["labels"][b, own[0] + 2 : own[1]] = batch["input_ids"][b, own[0] + 2 : own[1]]
        places = torch.randint(*theirs, (own[1] - own[0],), generator=generator)
        some = torch.rand(places.shape, generator=generator) < 0.6
        batch["teacher_positions"][b, own[0] : own[1]] = places.where(some, -1)
    return batch


def make(recipe, *, width=24, **given):
    """A model in float64, its compressed head as good as whole."""
    recipe = KDConfig(output_dir="none", recipe=recipe, compressed_kl=None, **given).resolved()
    if recipe.teacher == "compressed_head":
        given_rank = KDConfig(output_dir="none", recipe=recipe.name, compressed_rank=width, compressed_kl=None, **given)
        recipe = given_rank.resolved()
    model = DistillationModel(tiny(layers=2), tiny(width=width, seed=1, layers=2), recipe=recipe).double()
    model.solve([own_batch(seed) for seed in range(2, 12)], 60)
    return model


def rows_alone(model, batch):
    """Each row without padding: the student's output, the teacher's logits and hidden states at its positions."""
    for b in range(len(batch["input_ids"])):
        real, theirs = (batch[f"{prefix}attention_mask"][b].bool() for prefix in ("", "teacher_"))
        ours = model.student(input_ids=batch["input_ids"][b, real][None], output_hidden_states=True)
        with torch.no_grad():
            own = model.teacher(input_ids=batch["teacher_input_ids"][b, theirs][None], output_hidden_states=True)
        positions = batch["teacher_positions"][b, real][:-1]
        at = (positions - int(theirs.nonzero()[0])).clamp(0)
        hidden = [states[0, at] for states in own.hidden_states]
        yield ours, own.logits[0, at], hidden, batch["labels"][b, real][1:], positions >= 0


def by_hand(model, batch):
    """The total loss, its terms and KL(teacher ‖ student) at τ = 1, as means over what counts."""
    recipe, head = model.recipe, model.student.get_output_embeddings().weight
    sums, counts = dict.fromkeys(["ce", "kd", "anchor", "hidden", "kl"], 0.0), dict.fromkeys("ckt", 0)
    for ours, y, hidden, targets, aligned in rows_alone(model, batch):
        z, counted = ours.logits[0, :-1], targets != -100
        true = anchored = y
        if recipe.has_projector:
            projected = model.logit_projector(hidden[-1])
            y = F.linear(projected, model.logit_projector.head if recipe.teacher == "probe" else head)
            anchored = y if recipe.teacher == "probe" else F.linear(projected, head.detach())
        own = counted & aligned
        kd_rows = aligned if recipe.kd_on == "all" else own
        sums["ce"] += F.cross_entropy(z[counted], targets[counted], reduction="sum")
        if own.any():
            sums["anchor"] += F.cross_entropy(anchored[own], targets[own], reduction="sum")
            sums["kl"] += kl(true[own], z[own], 1.0) if true.shape == z.shape else torch.nan
        learned = y.detach() if recipe.teacher == "probe" else y
        sums["kd"] += TAU**2 * kl(learned[kd_rows], z[kd_rows], TAU)
        if model.hidden_loss is not None:
            for (i, j), linear in zip(model.hidden_loss.pairs, model.hidden_loss.maps, strict=True):
                one, other = linear(ours.hidden_states[i][0, :-1][kd_rows]), hidden[j][kd_rows]
                one, other = (F.layer_norm(x, x.shape[-1:]) for x in (one, other))
                sums["hidden"] += (one - other).square().mean(-1).sum() / 2 / len(model.hidden_loss.pairs)
        for name, some in (("c", counted), ("k", kd_rows), ("t", own)):
            counts[name] += int(some.sum())
    means = {name: sums[name] / counts[by] for name, by in zip(sums, "cktkt", strict=True)}
    weights = {"ce": 1.0, "kd": KD_WEIGHT, "anchor": recipe.anchor_weight, "hidden": recipe.hidden_weight}
    return sum(weight * means[name] for name, weight in weights.items()), means, counts


def kl(y, z, tau):
    return F.kl_div((z / tau).log_softmax(-1), (y / tau).log_softmax(-1), reduction="sum", log_target=True)


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def compare(model, truth, loss, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    ours, theirs = gradients(model, loss), gradients(truth, expected)
    for name in theirs:
        assert (ours[name] is None or not ours[name].any()) if theirs[name] is None else True, name
        assert theirs[name] is None or relative(ours[name], theirs[name]) <= 1e-6, name


@pytest.mark.parametrize("kd_on", ["completion", "all"])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_value_gradients_and_metrics_are_those_of_the_rows_alone(recipe, kd_on):
    if recipe == "probe" and kd_on == "all":
        return  # refused below
    model, batch = make(recipe, kd_on=kd_on), own_batch()
    truth = copy.deepcopy(model)
    output = model(**batch, temperature=TAU, kd_weight=KD_WEIGHT, with_fidelity=True)
    expected, means, counts = by_hand(truth, batch)
    compare(model, truth, output.loss, expected)
    assert (output.targets, output.metrics.tokens, output.compared) == tuple(counts[name] for name in "ckt")
    assert output.metrics.kd.item() == pytest.approx(means["kd"].item() / TAU**2, rel=1e-6)
    assert output.fidelity.kl_teacher_student.item() == pytest.approx(means["kl"].item(), rel=1e-6)
    if model.recipe.has_projector:
        assert output.metrics.anchor.item() == pytest.approx(means["anchor"].item(), rel=1e-6)
        assert output.fidelity.ce_projected.item() == pytest.approx(means["anchor"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "given"),
    [("teacher_head", {"hidden_weight": 0.3}), ("projector", {"anchor_weight": 0.4, "hidden_weight": 0.3}),
     ("teacher_head", {"hidden_weight": 0.3, "kd_on": "all"})],
)  # fmt: skip
def test_layers_and_anchor_are_of_aligned_positions(recipe, given):
    model, batch = make(recipe, **given), own_batch()
    truth = copy.deepcopy(model)
    loss = model(**batch, temperature=TAU, kd_weight=KD_WEIGHT).loss
    compare(model, truth, loss, by_hand(truth, batch)[0])


@pytest.mark.parametrize(
    ("recipe", "given"),
    [("teacher_head", {}), ("teacher_head", {"kd_on": "all", "hidden_weight": 0.2}), ("probe", {}),
     ("projector", {"anchor_weight": 0.4})],
)  # fmt: skip
def test_rows_one_by_one_are_the_batch(recipe, given):
    """Divided by what counts in the whole step: one of the rows has a single position, or none."""
    model, batch = make(recipe, **given), own_batch()
    batch["teacher_positions"][3] = -1
    targets = model.targets(batch["labels"], batch["attention_mask"])
    masks = (batch[name] for name in ("input_ids", "attention_mask"))
    kd_targets = model.kd_targets(targets, *masks, None, batch["teacher_positions"])
    items = {"num_items_in_batch": (targets != -100).sum(), "kd_items_in_batch": (kd_targets != -100).sum()}
    whole = model(**batch, temperature=TAU, kd_weight=KD_WEIGHT).loss
    losses = [
        model(**{name: x[i : i + 1] for name, x in batch.items()}, temperature=TAU, kd_weight=KD_WEIGHT, **items).loss
        for i in range(4)
    ]
    torch.testing.assert_close(sum(losses), whole, rtol=1e-6, atol=0)
    assert max(map(relative, gradients(model, sum(losses)).values(), gradients(model, whole).values())) <= 1e-6


@pytest.mark.parametrize("routed", [False, True])
def test_several_teachers_read_the_same_ids_of_their_own(routed):
    """One of them the student itself: the weighted sum of what each teaches, or each row from its own."""
    student, other, batch = tiny(layers=2).double(), tiny(width=24, seed=1, layers=2).double(), own_batch()
    given = {"temperature": TAU, "kd_weight": KD_WEIGHT}
    both = DistillationModel(
        student, {"other": other, "own": "self"}, recipe="teacher_head",
        teacher_weights=None if routed else [0.3, 0.7],
    )  # fmt: skip
    alone = [DistillationModel(student, one, recipe="teacher_head") for one in (other, both.teachers["own"])]
    if routed:
        rows, names = [[0, 2], [1, 3]], ["other", "own", "other", "own"]
        targets = both.targets(batch["labels"], batch["attention_mask"])
        kd_targets = both.kd_targets(targets, batch["input_ids"], None, None, batch["teacher_positions"])
        items = {"num_items_in_batch": (targets != -100).sum(), "kd_items_in_batch": (kd_targets != -100).sum()}
        found = both(**batch, **given, teacher_id=names).loss
        parts = [{name: x[some] for name, x in batch.items()} for some in rows]
        expected = sum(model(**part, **given, **items).loss for model, part in zip(alone, parts, strict=True))
    else:
        found = both(**batch, **given).loss
        weights = [KD_WEIGHT * 0.3, KD_WEIGHT * 0.7]
        parts = [m(**batch, temperature=TAU, kd_weight=w).loss for m, w in zip(alone, weights, strict=True)]
        expected = sum(parts) - alone[0](**batch, kd_weight=0.0).loss
    compare(both, both, found, expected)


def test_a_teacher_that_reads_the_students_ids_is_as_without():
    model, batch = make("teacher_head"), own_batch()
    plain = {name: x for name, x in batch.items() if not name.startswith("teacher_")}
    own = {f"teacher_{name}": plain[name] for name in ("input_ids", "attention_mask")}
    every = torch.arange(9).expand(4, 9).masked_fill(plain["attention_mask"] == 0, -1)
    torch.testing.assert_close(model(**plain).loss, model(**plain, **own, teacher_positions=every).loss, rtol=0, atol=0)


def test_under_a_weight_of_0_the_teacher_does_not_run():
    model, batch = make("teacher_head"), own_batch()
    model.teacher.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    plain = {name: x for name, x in batch.items() if not name.startswith("teacher_")}
    assert model(**batch, kd_weight=0.0).loss == model(**plain, kd_weight=0.0).loss


def test_starts_are_solved_from_what_the_teacher_reads():
    model, batches = make("teacher_head"), [own_batch(seed) for seed in range(2, 12)]
    text = Calibration(model.student, model.teacher, batches, 60, model.loss_options)
    found = [
        hidden[-1][(targets != -100) & aligned]
        for batch in batches
        for _, _, hidden, targets, aligned in rows_alone(model, batch)
    ]
    torch.testing.assert_close(text.whole.hidden, torch.cat(found)[:60], rtol=0, atol=1e-5)  # RoPE is in fp32


def test_the_teacher_may_have_other_ids():
    """Each model is asked for its own: the student's ids are beyond the teacher's rows."""
    recipe = RECIPES["projector"]
    model = DistillationModel(tiny(V=90), tiny(V=40, width=24, seed=1), recipe=recipe).double()
    batch = own_batch(V=90, own_V=40)
    assert batch["input_ids"].max() >= 40
    loss = model(**batch, temperature=TAU, kd_weight=KD_WEIGHT).loss
    torch.testing.assert_close(loss, by_hand(model, batch)[0], rtol=1e-6, atol=0)
    batch["teacher_input_ids"][0, 0] = 40
    with pytest.raises(ValueError, match="teacher_input_ids contains 40, and the teacher has 40 token embeddings"):
        model(**batch)


@pytest.mark.parametrize(
    ("change", "recipe", "expected"),
    [
        ({"teacher_positions": None}, {}, "teacher_positions is None beside teacher_input_ids"),
        ({"teacher_input_ids": None}, {}, "teacher_input_ids is None beside teacher_attention_mask"),
        ({"teacher_positions": torch.zeros(4, 12)}, {}, r"teacher_positions is \(4, 12\) beside input_ids \(4, 9\)"),
        ({"teacher_attention_mask": torch.ones(4, 9)}, {}, r"teacher_attention_mask is \(4, 9\).*expected \(4, 12\)"),
        ({"teacher_positions": torch.full((4, 9), 12)}, {}, "teacher_positions has 12; expected places of"),
        ({"teacher_positions": torch.full((4, 9), -2)}, {}, "teacher_positions has -2; expected places of"),
        ({"teacher_positions": torch.full((4, 9), 0)}, {}, "teacher_positions has 0; expected .* that are no padding"),
        ({"token_type_ids": torch.zeros(4, 9)}, {}, "does not read token_type_ids"),
        ({}, {"recipe": "cached"}, "recipe 'cached' learns from entries; expected precompute_teacher_log_probs=False"),
        ({}, {"recipe": "probe", "kd_on": "all"}, "kd_on='all' and recipe 'probe' with an anchor"),
        ({}, {"recipe": "projector", "kd_on": "all", "anchor_weight": 1.0}, "kd_on='all' and recipe 'projector'"),
    ],
)
def test_what_does_not_fit_is_said(change, recipe, expected):
    recipe = KDConfig(output_dir="none", **{"recipe": "teacher_head", **recipe}).resolved()
    model = DistillationModel(tiny(), tiny(width=24, seed=1), recipe=recipe)
    with pytest.raises(ValueError, match=expected):
        model(**{**own_batch(), **change})


def test_images_go_with_the_students_ids():
    model = DistillationModel(tiny_vision(), tiny_vision(seed=1), recipe="teacher_head")
    batch = image_batch()
    own = {"teacher_input_ids": batch["input_ids"], "teacher_positions": torch.arange(12).expand(2, 12)}
    with pytest.raises(ValueError, match="teacher_input_ids and pixel_values, which goes with input_ids"):
        model(**batch, **own)


def test_without_a_teacher_they_are_not_used_and_that_is_said(capsys, caplog):
    model, batch = DistillationModel(tiny(), recipe="lm_only"), own_batch()
    plain = {name: x for name, x in batch.items() if not name.startswith("teacher_")}
    assert model(**batch).loss == model(**plain).loss
    said = capsys.readouterr()
    assert "recipe 'lm_only' has no teacher: teacher_input_ids are not used" in said.out + said.err + caplog.text
