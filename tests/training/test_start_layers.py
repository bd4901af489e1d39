"""student_init='svd_blocks': a student that is its teacher, narrower and with fewer layers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdfast.closed_form import random_rotation
from kdfast.training import DistillationModel
from kdfast.training.initialization.layers import Decoder, _basis, _choose_heads, find_misfit, start_layers
from kdfast.training.recipes import Recipe, choose_recipe

V, T = 67, 16
FAMILIES = {
    "gpt2": {},
    "llama": {"tie_word_embeddings": False},
    "llama, biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
}


def make(family, width=32, layers=2, heads=4, keys=2, inner=48, seed=0, **settings):
    """A random model whose norms and biases are not what they are in a fresh one."""
    name, ids = family.partition(",")[0], {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 8}
    sizes |= {"num_key_value_heads": keys, "intermediate_size": inner, "max_position_embeddings": 64}
    if name == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": inner, "n_positions": 64}
    elif name == "qwen2":
        del sizes["head_dim"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, vocab_size=V, **ids, **{**sizes, **FAMILIES[family], **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def batches(n=16, seed=3):
    ids = torch.randint(3, V, (n, 4, T), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": x, "labels": x} for x in ids]


def solve(student, teacher, text=None, **options):
    model = DistillationModel(student, teacher, recipe=Recipe("test", teacher="none", student_init="svd_blocks"))
    return model.solve(text or batches(), **options)


def log_probs(model, ids):
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_the_teachers_sizes_becomes_the_teacher(family):
    teacher, student = make(family, seed=1), make(family)
    (start,) = solve(student, teacher)
    assert start.kl < 1e-6
    ids = batches(1, seed=9)[0]["input_ids"]
    torch.testing.assert_close(log_probs(student, ids), log_probs(teacher, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_within_fewer_coordinates_is_kept_whole(family):
    """What the teacher writes lies in a random subspace of the student's size, and one head writes nothing."""
    teacher, student = make(family, keys=4, seed=1), make(family, width=24, heads=3, keys=3)
    decoder = Decoder(teacher)
    basis = torch.eye(32, 24, dtype=torch.float64)
    if decoder.layer_norm:  # the constant direction is one of the student's
        basis[:, 0] = 1.0
    turned = torch.cat([basis[:, :1], random_rotation(32, basis)[:, 1:24]], 1)
    basis = torch.linalg.qr(turned).Q
    keep = (basis @ basis.T).float()
    with torch.no_grad():
        for embedding in (teacher.get_input_embeddings(), getattr(decoder.inner, "wpe", None)):
            if embedding is not None:
                embedding.weight.copy_(embedding.weight @ keep)
        decoder.norm.weight.fill_(1.3)
        for sublayer in decoder.sublayers:
            writer = sublayer.writer
            by_input = writer.weight if decoder.layer_norm else writer.weight.T
            if sublayer.heads:
                by_input[8:16] = 0
            by_input.copy_(by_input @ keep)
            if writer.bias is not None:
                writer.bias.copy_(writer.bias @ keep)
    solve(student, teacher)
    ids = batches(1, seed=9)[0]["input_ids"]
    torch.testing.assert_close(log_probs(student, ids), log_probs(teacher, ids), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_basis(family):
    """Orthonormal rows; for LayerNorm, which subtracts means, constant vectors stay constant."""
    teacher, student = make(family), make(family, width=24, heads=3, keys=1)
    a = torch.randn(100, 32, dtype=torch.float64)
    Q = _basis(a.T @ a, Decoder(student), Decoder(teacher))
    torch.testing.assert_close(Q @ Q.T, torch.eye(24, dtype=torch.float64))
    if family == "gpt2":
        ones = Q @ torch.ones(32, dtype=torch.float64)
        torch.testing.assert_close(ones, torch.full((24,), (32 / 24) ** 0.5, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_student_starts_near_its_teacher(family):
    """With fewer layers, heads, keys and neurons, nearer by far than with the solved embedding alone."""
    teacher, ids = make(family, layers=4, seed=1), batches(1, seed=9)[0]["input_ids"]
    true, kl = log_probs(teacher, ids), {}
    for init in ("svd", "svd_blocks"):
        student = make(family, width=16, heads=2, keys=1, inner=40)
        model = DistillationModel(student, teacher, recipe=Recipe("test", teacher="none", student_init=init))
        starts = model.solve(batches())
        kl[init] = float((true.exp() * (true - log_probs(student, ids))).sum(-1).mean())
    assert starts[0].what == "student_init='svd_blocks', the student itself"
    assert starts[0].kl == pytest.approx(kl["svd_blocks"], rel=0.5)
    assert kl["svd_blocks"] < 0.7 * kl["svd"]


def test_a_half_precision_student_and_untied_ends():
    teacher, student = make("llama", seed=1).bfloat16(), make("llama").bfloat16()
    (start,) = solve(student, teacher)
    assert start.kl < 0.02
    assert student.training is False
    assert not torch.equal(student.get_input_embeddings().weight, student.get_output_embeddings().weight)


def test_a_student_without_a_row_for_padding():
    student, teacher = make("llama", width=24), make("llama", seed=1)
    teacher.resize_token_embeddings(V + 5)
    (text, *_), mask = batches(1), torch.ones(4, T, dtype=torch.int64)
    text["input_ids"], mask[:, -2:] = text["input_ids"].clone(), 0
    text["input_ids"][:, -2:] = V + 1
    text |= {"attention_mask": mask, "labels": text["labels"].masked_fill(mask == 0, -100)}
    recipe = Recipe("test", teacher="none", student_init="svd_blocks")
    (start,) = DistillationModel(student, teacher, recipe=recipe, valid_vocab=V).solve([text])
    assert start.kl > 0


def test_heads_of_one_key_stay_together():
    outputs = torch.tensor([1.0, 9, 2, 3, 8, 7, 0, 0])  # eight heads, four keys of two
    heads, keys = _choose_heads(outputs, (8, 4), (4, 2))
    assert (heads.tolist(), keys.tolist()) == ([0, 1, 4, 5], [0, 2])
    heads, keys = _choose_heads(outputs, (8, 4), (2, 2))
    assert (heads.tolist(), keys.tolist()) == ([1, 4], [0, 2])


MISFITS = {
    "family": ({"family": "qwen2"}, "model_type is 'qwen2' and the teacher's 'llama'; expected one of gpt2, llama"),
    "head size": ({"head_dim": 16}, "the student's heads are 16 wide and the teacher's 8"),
    "heads": ({"heads": 8}, "num_attention_heads is 8 and the teacher's 4"),
    "keys": ({"keys": 4}, "num_key_value_heads is 4 and the teacher's 2"),
    "group": ({"keys": 1}, "num_attention_heads / num_key_value_heads is 4 and the teacher's 2"),
    "layers": ({"layers": 3}, "num_hidden_layers is 3 and the teacher's 2"),
    "width": ({"width": 40}, "hidden_size is 40 and the teacher's 32"),
    "neurons": ({"inner": 64}, "MLP's width is 64 and the teacher's 48"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is True and the teacher's False"),
    "rotary": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters is"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named(case):
    settings, expected = MISFITS[case]
    student, teacher = make(**{"family": "llama", **settings}), make("llama", seed=1)
    assert expected in (find_misfit(student, teacher) or "")
    with pytest.raises(ValueError, match=r"student_init='svd_blocks' takes .* Or use student_init='svd'"):
        DistillationModel(student, teacher, recipe=Recipe("test", teacher="none", student_init="svd_blocks"))
    assert find_misfit(make("llama"), teacher) is None


def test_layers_that_look_back_differently_do_not_fit():
    assert "sliding_window is 8 and the teacher's None" in find_misfit(
        make("mistral", sliding_window=8), make("mistral")
    )
    some = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert "layer_types has several kinds" in find_misfit(make("qwen2", **some), make("qwen2", seed=1, **some))
    every = {**some, "max_window_layers": 0}
    assert find_misfit(make("qwen2", **every), make("qwen2", seed=1, **every)) is None


@pytest.mark.parametrize("init", ["svd", "svd_blocks"])
def test_a_teachers_weights_are_not_overwritten(init):
    student, teacher = make("llama"), make("llama", seed=1)
    student.lm_head = teacher.lm_head
    with pytest.raises(ValueError, match=rf"share 'lm_head.weight', which student_init='{init}' would overwrite"):
        DistillationModel(student, teacher, recipe=Recipe("test", teacher="none", student_init=init))


def test_a_teacher_that_is_not_finite_is_named():
    teacher = make("llama", seed=1)
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    ids = batches(1)[0]["input_ids"]
    text = [({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))]
    with torch.no_grad(), pytest.raises(ValueError, match="NaN or infinity on this text"):
        start_layers(make("llama", width=24), teacher, text, torch.ones(V), None)


def test_auto_takes_the_layers_of_a_fresh_student_where_they_fit():
    teacher, config = make("gpt2", seed=1), make("gpt2").config
    found = choose_recipe(AutoModelForCausalLM.from_config(config), teacher)
    assert found.recipe == "svd_blocks"
    trained = make("gpt2")
    trained.transformer.wte.weight.data.normal_()
    found = choose_recipe(trained, teacher)
    assert (found.recipe, "Its layers can't be (they are trained" in found.why) == ("svd_init", True)
    config.n_layer = 3
    found = choose_recipe(AutoModelForCausalLM.from_config(config), teacher)
    assert found.recipe == "svd_init"
    assert "the student's num_hidden_layers is 3 and the teacher's 2" in found.why
