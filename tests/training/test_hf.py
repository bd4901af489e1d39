import oracle
import pytest
import torch
from torch import nn
from transformers import (
    ElectraConfig,
    ElectraForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MllamaForCausalLM,
    MllamaTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kdfast.training import DistillationModel, backbone, head
from kdfast.training.hf import check_model

FAMILIES = ["gpt2", "llama", "qwen2", "gemma2", "cohere", "granite", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_over_backbone_is_the_models_logits(tiny, family):
    model = tiny(family).eval()
    ids = torch.arange(5, 17)[None]
    ours = head(model, backbone(model)(input_ids=ids).last_hidden_state)
    logits = ours.logit_scale * (ours.hidden @ ours.weight.T)
    if ours.softcap is not None:
        logits = ours.softcap * torch.tanh(logits / ours.softcap)
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_accepts_known_families_and_leaves_no_trace(tiny, family, dtype):
    model = tiny(family, dropout=0.1).to(dtype).train()
    model.get_input_embeddings().eval()
    state = torch.get_rng_state()
    check_model(model, "student")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.get_input_embeddings().training, "a part in eval mode stays there"
    assert not backbone(model)._forward_hooks


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_check_sees_a_factor_that_was_not_read(tiny, family, monkeypatch):
    # initializer_range 0.002: the logits of a fresh model are so small that a cap would not show at their own size
    model = tiny(family, spread=0.002)
    check_model(model, "teacher")
    monkeypatch.setattr("kdfast.training.hf._logit_scale", lambda config: 1.0)
    monkeypatch.setattr("kdfast.training.hf._softcap", lambda config: None)
    with pytest.raises(ValueError, match=rf"teacher \({type(model).__name__}\).*not known here"):
        check_model(model, "teacher")


def test_check_sees_a_head_that_transforms_first(tiny):
    model = tiny("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*off by 1\.0%"):
        check_model(model, "student")


def test_check_sees_a_head_of_another_width():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    model = ElectraForCausalLM(ElectraConfig(vocab_size=67, embedding_size=8, is_decoder=True, **sizes))
    with pytest.raises(ValueError, match="its head does not take the 16 hidden states as they are"):
        check_model(model, "student")


def test_an_adapter_on_the_head_is_refused(tiny):
    # what PEFT puts in place of a layer it adapts: a module that holds the layer, and has a weight too
    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.weight = layer, layer.weight

    model = tiny("llama")
    model.set_output_embeddings(Adapted(model.lm_head))
    with pytest.raises(ValueError, match=r"student \(LlamaForCausalLM\) has an adapter on its head \(Adapted\)"):
        check_model(model, "student")
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM has an adapter on its head"):
        head(model, torch.zeros(1, 16))  # in a loop of one's own, where nothing was checked


def test_what_is_no_causal_language_model_is_refused(tiny):
    with pytest.raises(TypeError, match="student is Linear; expected a transformers PreTrainedModel"):
        check_model(nn.Linear(2, 2), "student")
    with pytest.raises(TypeError, match=r"teacher \(LlamaModel\) has NoneType as its head"):
        check_model(tiny("llama").model, "teacher")


SIZES = {"vocab_size": 67, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
UNUSUAL = {  # base_model and get_decoder() are the model itself; and a mixture of experts
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=32, attention_chunk_size=16)
    ),
    "mllama": lambda: MllamaForCausalLM(
        MllamaTextConfig(
            **SIZES, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
        )
    ),
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_models_teach_and_learn(tiny, family):
    model, other = UNUSUAL[family](), tiny("llama")
    ids = torch.arange(5, 17)[None]
    z_t = model.eval()(ids).logits[:, :-1].detach().double()
    z_s = other(ids).logits[:, :-1].double()
    expected = oracle.kl((z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1)).mean() * 4
    loss = DistillationModel(other, model, recipe="teacher_head")(ids, labels=ids, temperature=2.0, kd_weight=1.0)
    torch.testing.assert_close(loss.metrics.kd.double() * 4, expected, rtol=1e-5, atol=1e-6)
    learnt = DistillationModel(UNUSUAL[family](), recipe="lm_only", router_aux_loss_coef=0).train()
    torch.testing.assert_close(learnt(ids, labels=ids).loss, learnt.student(ids, labels=ids).loss)


def test_learned_prompts_are_no_part_of_a_backbone(tiny):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="model is PeftModelForCausalLM with PROMPT_TUNING; prompt and prefix"):
        backbone(model)
