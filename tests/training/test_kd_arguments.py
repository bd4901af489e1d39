"""β, α, kd_ratio and vocab of a KDConfig: what they mean, against plain torch with whole logits."""

import pytest
import torch
import torch.nn.functional as F
from byte_tokenizer import make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from kdfast.cli.arguments import parse_mapping
from kdfast.training import DistillationModel, KDTrainer
from kdfast.training.recipes import choose_recipe

TAU = 2.0


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(beta):
    def value(p, q):
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return value


def mixed(alpha, p, q):
    return (alpha * p.exp() + (1 - alpha) * q.exp()).log()


# what is given → the divergence of log p and log q, by hand; β and its ends as in TRL's generalized JSD
DIVERGENCES = [
    ({"beta": 0.3}, jsd(0.3)),
    ({"divergence": "jsd", "beta": 0.9}, jsd(0.9)),
    ({"divergence": "jsd"}, jsd(0.5)),
    ({"beta": 0.0}, kl),
    ({"beta": 1.0}, lambda p, q: kl(q, p)),
    ({"divergence": "skew_kl", "alpha": 0.3}, lambda p, q: kl(p, mixed(0.3, p, q))),
    ({"divergence": "skew_reverse_kl", "alpha": 0.3}, lambda p, q: kl(q, mixed(0.3, q, p))),
    ({"divergence": "alpha_beta", "alpha": 0.2, "beta": 0.7}, lambda p, q: alpha_beta(0.2, 0.7, p, q)),
]


def alpha_beta(a, b, p, q):
    both = a + b
    terms = (a * p + b * q).exp() - a / both * (both * p).exp() - b / both * (both * q).exp()
    return -terms.sum(-1) / (a * b)


def by_hand(student, teacher, batch, divergence=kl, ce_weight=1.0, kd_weight=0.7, ids=None):
    """The loss from whole logits; the KD term over the first `ids` of them."""
    with torch.no_grad():
        z_t = teacher(batch["input_ids"]).logits[:, :-1]
    z_s, labels = student(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    log_p, log_q = ((z[..., :ids] / TAU).log_softmax(-1) for z in (z_t, z_s))
    kd = divergence(log_p, log_q)[labels != -100].mean()
    return ce_weight * F.cross_entropy(z_s.flatten(0, 1), labels.flatten()) + kd_weight * TAU**2 * kd


def assert_same_training(model, truth):
    """The loss and every gradient of `model`'s batch are those of `truth`, a function of the batch."""
    ids = torch.randint(3, 67, (3, 9), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}
    expected, found = truth(batch), model(**batch).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    trained = [p for p in model.student.parameters() if p.requires_grad]
    pairs = zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True)
    assert max(((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in pairs) < 1e-6


@pytest.mark.parametrize(("given", "divergence"), DIVERGENCES)
def test_a_divergence_and_its_parameter(tiny, config, given, divergence):
    recipe = config(recipe="teacher_head", **given).resolved()
    student, teacher = tiny("llama").double(), tiny("llama", seed=1, width=32).double()
    model = DistillationModel(student, teacher, recipe=recipe)
    assert_same_training(model, lambda batch: by_hand(student, teacher, batch, divergence))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_kd_ratio_is_the_two_weights(tiny, config, ratio):
    """(1 − r)·CE + r·KD, τ² within KD, as NeMo AutoModel has it."""
    recipe = config(recipe="teacher_head", kd_ratio=ratio).resolved()
    student, teacher = tiny("llama").double(), tiny("llama", seed=1, width=32).double()
    model = DistillationModel(student, teacher, recipe=recipe)
    assert_same_training(model, lambda batch: by_hand(student, teacher, batch, ce_weight=1 - ratio, kd_weight=ratio))


def test_kd_ratio_goes_with_the_other_settings(config):
    resolved = config(recipe="svd_init", kd_ratio=1.0, kd_ramp=0.1).resolved()
    assert (resolved.kd_weight, resolved.ce_weight, resolved.kd_ramp, resolved.kd_until) == (1.0, 0.0, 0.1, 1.0)


def test_kd_ratio_is_nothing_to_a_run_without_a_teacher(config, caplog):
    assert config(recipe="lm_only", kd_ratio=0.9).resolved().ce_weight == 1.0
    assert "recipe='lm_only' has no use for kd_ratio" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"divergence": "forward_kl", "beta": 0.3}, "beta=0.3 with divergence='forward_kl'.* one of jsd, alpha_beta"),
        ({"divergence": "skew_kl", "beta": 0.3}, "beta=0.3 with divergence='skew_kl'"),
        ({"divergence": "jsd", "alpha": 0.3}, "alpha=0.3 with divergence='jsd'.* one of skew_kl, skew_reverse_kl, alp"),
        ({"alpha": 0.3}, "alpha=0.3 with divergence='forward_kl', which has none"),
        ({"beta": 1.3}, r"JSD\(beta=1.3\): beta must lie in \[0, 1\]"),
        ({"divergence": "skew_kl", "alpha": 1.0}, r"SkewKL\(alpha=1.0\): alpha must lie in \[0, 1\)"),
        ({"beta": "0.3"}, "beta='0.3'; expected a number"),
        ({"kd_ratio": 1.2}, r"kd_ratio=1.2; expected a number in \[0, 1\]"),
        ({"kd_ratio": 0.5, "ce_weight": 0.5}, "kd_ratio=0.5 and ce_weight=0.5; expected kd_ratio, or"),
        ({"kd_ratio": 0.5, "kd_weight": 0.0}, "kd_ratio=0.5 and kd_weight=0; expected kd_ratio, or"),
        ({"vocab": "pad"}, "vocab='pad'; expected one of error, truncate"),
    ],
)
def test_what_does_not_go_together_is_named(config, given, message):
    with pytest.raises(ValueError, match=message):
        config(**given)


def test_the_command_line_has_them():
    keys = {"student_config": "c", "train_file": "t", "teacher_model_name_or_path": "t", "output_dir": "o"}
    given = {"divergence": "skew_kl", "alpha": 0.2, "kd_ratio": 0.4, "vocab": "truncate", "use_cpu": True}
    training = parse_mapping("config", {**keys, **given}, ["--kd_ratio", "0.6"]).training
    assert (training.divergence, training.alpha, training.beta) == ("skew_kl", 0.2, None)
    assert (training.kd_ratio, training.vocab) == (0.6, "truncate")
    assert parse_mapping("config", {**keys, "beta": 0.5, "use_cpu": True}).training.divergence == "jsd"


# vocab="truncate"


@pytest.mark.parametrize("rows", [(67, 80), (80, 67)])  # of the student and of the teacher
@pytest.mark.parametrize("recipe", ["teacher_head", "compressed_head"])
def test_heads_of_unlike_size_are_compared_at_their_first_ids(tiny, rows, recipe):
    student = tiny("llama", V=rows[0]).double()
    teacher = tiny("llama", V=rows[1], seed=1).double()
    model = DistillationModel(student, teacher, recipe=recipe, vocab="truncate")
    if recipe == "compressed_head":  # of width 16: at full rank it is the head itself
        ids = torch.randint(3, 67, (8, 9), generator=torch.Generator().manual_seed(4))
        model.recipe = model.recipe.__class__(**{**vars(model.recipe), "compressed_kl": None, "compressed_rank": 16})
        model.solve([{"input_ids": ids, "labels": ids}], tokens=64)
    weight = model.recipe.kd_weight
    assert_same_training(model, lambda batch: by_hand(student, teacher, batch, kd_weight=weight, ids=67))


def test_evaluation_compares_there_too(tiny, batch):
    student, teacher = tiny("llama"), tiny("llama", V=80, seed=1)
    found = DistillationModel(student, teacher, recipe="teacher_head", vocab="truncate")(**batch, with_fidelity=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_p, log_q = (model(**inputs).logits[:, :-1, :67].log_softmax(-1) for model in (teacher, student))
    mask = batch["attention_mask"].bool()
    counts = (batch["labels"][:, 1:] != -100) & mask[:, 1:] & mask[:, :-1]
    torch.testing.assert_close(found.fidelity.kl_teacher_student, kl(log_p, log_q)[counts].mean())


def save(folder, words, V, width):
    """A model with V rows beside a tokenizer with `words` of its own after the 257 of bytes."""
    torch.manual_seed(width)
    rest = {"bos_token_id": 256, "eos_token_id": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=width, n_head=2, n_positions=32, vocab_size=V, **rest)
    ).save_pretrained(folder)
    make_tokenizer(words).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("words", [[], ["<tool>", "<think>"]])  # padding alone, and tokens that only the teacher has
def test_the_trainer_takes_a_teacher_with_more_rows(tmp_path, config, words):
    student, teacher = save(tmp_path / "student", [], 257, 16), save(tmp_path / "teacher", words, 264, 32)
    ids = torch.randint(0, 257, (8, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    expected = by_hand(student, teacher, {"input_ids": ids[:2], "labels": ids[:2]}, ids=257)

    def trainer(**given):
        return KDTrainer(
            student,
            config(recipe="teacher_head", max_steps=1, train_sampling_strategy="sequential", **given),
            teacher=teacher,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=default_data_collator,
            processing_class=make_tokenizer(),
        )

    if words:  # whose ids are others than the student's tokenizer's
        with pytest.raises(ValueError, match=r"teacher's head has 264 rows and the student's 257.*vocab='truncate'"):
            trainer()
    asked = trainer(vocab="truncate", metric_for_best_model="kl_teacher_student", eval_strategy="steps")
    asked.train()
    logged = next(line["loss"] for line in asked.state.log_history if "loss" in line)
    assert logged == pytest.approx(expected.item(), rel=1e-5)
    assert asked.evaluate()["eval_kl_teacher_student"] > 0


def test_nothing_is_solved_from_a_teacher_of_other_ids(tiny, config):
    student, teacher = tiny("llama", V=67), tiny("llama", V=80, seed=1)
    for recipe in ("svd_init", "svd_blocks", "projector_refit"):
        with pytest.raises(ValueError, match=rf"vocab='truncate' with recipe '{recipe}', which solves.*\(67\).*\(80\)"):
            DistillationModel(student, teacher, recipe=recipe, vocab="truncate")
    choice = choose_recipe(student, teacher, vocab="truncate")
    assert choice.recipe == "compressed_head"
    assert "the student has 67 ids, the teacher 80" in choice.why
    assert DistillationModel(student, teacher, vocab="truncate").recipe.name == "compressed_head"
    assert choose_recipe(tiny("llama", V=67), tiny("llama", seed=1), vocab="truncate").recipe != "compressed_head"


def test_where_the_text_comes_again_the_teachers_head_is_still_needed(tiny, config, rows, capsys):
    args = config(
        recipe="teacher_head", vocab="truncate", precompute_teacher_log_probs=None, num_train_epochs=3, max_steps=-1
    )
    models = tiny("llama", V=67), tiny("llama", V=80, seed=1)
    KDTrainer(models[0], args, teacher=models[1], train_dataset=rows(4))
    printed = capsys.readouterr().out
    assert "the teacher runs at every step" in printed
    assert "vocab='truncate', where the student has 67 ids and the teacher 80, needs its head" in printed
    args.precompute_teacher_log_probs = True
    with pytest.raises(ValueError, match=r"cannot be run beforehand.*vocab='truncate', where the student has 67 ids"):
        KDTrainer(models[0], args, teacher=models[1], train_dataset=rows(4))
