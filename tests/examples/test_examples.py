"""Every example for three steps: it runs, and its loss is the one of whole logits on its text, with labels one on.

Whole runs, whose docstrings promise a falling cross entropy, are marked slow.
"""

import ast
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny, tiny_moe
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from kdfast import Head, Projected, fused_kd_loss
from kdfast.training import DistillationModel

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
NEEDS = {"lightning_module": "lightning", "lora_chat": "peft"}
NEEDS |= dict.fromkeys(("trl_on_policy", "trl_trainer", "vlm"), "trl")
SUMMARY = re.compile(r"held-out cross entropy: ([\d.]+) before, ([\d.]+) after")
STUDENT, TEACHER = 16, 32  # widths of the small models
IGNORED = -100

pytestmark = [
    # a machine without an accelerator, and what Lightning and TRL have of their own
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
]


@pytest.fixture
def calls(monkeypatch):
    """calls(module, reads) → a list of the module's training calls of `fused_kd_loss`, each of which is checked."""

    def record(module, reads):
        made = []

        def checked(student, teacher, labels=None, **options):
            result = fused_kd_loss(student, teacher, labels, **options)
            loss = result[0] if options.get("return_metrics") else result
            asked = {name: value for name, value in options.items() if name != "return_metrics"}
            expected = oracle.solve(_double(student), _double(teacher), labels, **asked).loss
            torch.testing.assert_close(loss.detach().double(), expected.double(), rtol=1e-5, atol=1e-6)
            of_student = next(read for read in reversed(reads) if read.width == STUDENT)
            assert student.hidden is of_student.hidden  # the last hidden states, of this batch
            if teacher is not None and not isinstance(teacher, Projected) and teacher.weight.shape[1] == TEACHER:
                of_teacher = next(read for read in reversed(reads) if read.width == TEACHER)
                assert teacher.hidden is of_teacher.hidden
                assert of_teacher.ids.shape == of_student.ids.shape
            assert labels[:, -1].eq(IGNORED).all()
            labelled = labels[:, :-1] != IGNORED
            assert labels[:, :-1][labelled].equal(of_student.ids[:, 1:][labelled])
            if loss.requires_grad:
                made.append((labels, options))
            return result

        monkeypatch.setattr(module, "fused_kd_loss", checked)
        return made

    return record


def _double(source):
    """In float64 and without a graph, for the oracle."""
    if source is None:
        return None
    tensors = [getattr(source, name) for name in source.__dataclass_fields__]
    tensors = [x.detach().double() if isinstance(x, torch.Tensor) else x for x in tensors]
    if isinstance(source, Projected):
        hidden, weight, bias, temperature = tensors
        return Projected(hidden, weight, bias, temperature=temperature)
    hidden, weight, bias, scale, softcap = tensors
    return Head(hidden, weight, bias, logit_scale=scale, softcap=softcap)


@pytest.fixture
def whole_logits(monkeypatch):
    """A list of (loss, divisor, targets) that every training call of a DistillationModel is appended to; each is
    compared with what both models' own logits come to."""
    made = []
    forward = DistillationModel.forward

    def checked(self, input_ids, attention_mask=None, labels=None, *, num_items_in_batch=None, **options):
        output = forward(self, input_ids, attention_mask, labels, num_items_in_batch=num_items_in_batch, **options)
        if not output.loss.requires_grad:
            return output
        with torch.no_grad():
            z_s, z_t = (
                model(input_ids, attention_mask=attention_mask).logits[:, :-1].double()
                for model in (self.student, self.teacher)
            )
        targets = labels[:, 1:]
        counts = targets != IGNORED
        kl = oracle.kl((z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1))[counts].sum()
        ce = -z_s.log_softmax(-1)[counts].gather(-1, targets[counts][:, None]).sum()
        items = counts.sum() if num_items_in_batch is None else num_items_in_batch
        expected = (ce + options["kd_weight"] * 4 * kl) / items
        torch.testing.assert_close(output.loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
        made.append((output.loss.item(), int(items), int(counts.sum())))
        return output

    monkeypatch.setattr(DistillationModel, "forward", checked)
    return made


def _three_steps(module, small, *more):
    module.main(["--use", *small, "--max-steps", "3", *more])


def _summaries(out):
    found = [tuple(map(float, numbers)) for numbers in SUMMARY.findall(out)]
    assert all(math.isfinite(x) for pair in found for x in pair)
    return found


@torch.no_grad()
def _cross_entropy(folder, rows):
    """Over all targets of `rows`, lists of ids, from whole logits, one row at a time: no batch, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = count = 0
    for row in rows:
        ids = torch.as_tensor(row)[None]
        log_p = model(ids).logits[:, :-1].double().log_softmax(-1)
        total -= log_p.gather(-1, ids[:, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total / count


def _blocks(small, text=3, first=64):
    ids = AutoTokenizer.from_pretrained(small[0])(Path(small[text]).read_text())["input_ids"]
    return torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)[:first]


def _paragraphs(small):
    parts = [part for part in Path(small[3]).read_text().split("\n\n") if len(part) > 80]
    return AutoTokenizer.from_pretrained(small[0])(parts[:200], truncation=True, max_length=128)["input_ids"]


def test_plain_loop(example, small, calls, reads, capsys):
    module = example("plain_loop")
    made = calls(module, reads)
    _three_steps(module, small)
    assert [options["kd_weight"] for _, options in made] == [0.0] * 3 + [2.0] * 3
    ((before, after),) = _summaries(capsys.readouterr().out)
    assert before == pytest.approx(_cross_entropy(small[1], _blocks(small)), abs=1e-3)
    assert after != before


def test_own_head_teacher(example, small, calls, reads, capsys):
    module = example("own_head_teacher")
    made = calls(module, reads)
    _three_steps(module, small, "--max-kl", "0.5")
    assert len(made) == 4 * 3
    out = capsys.readouterr().out
    rank, kl = re.search(r"rank (\d+) of 32, KL ([\d.]+)", out).groups()
    assert int(rank) <= TEACHER
    assert float(kl) <= 0.5
    table = [line.rsplit(maxsplit=3) for line in out.splitlines()[-4:]]
    assert [row[0] for row in table] == ["none", "projected", "own head", "compressed"]
    figures = [[float(x) for x in row[1:3]] for row in table]
    assert all(math.isfinite(x) for row in figures for x in row)
    assert len({tuple(row) for row in figures}) == 4  # four teachers, four students


def test_offline_teacher(example, small, reads, monkeypatch, capsys):
    """With every id kept, the loss is the live teacher's."""
    module = example("offline_teacher")
    teacher = AutoModelForCausalLM.from_pretrained(small[0]).double()
    losses = []

    def compared(student, cached, labels, **options):
        loss, metrics = fused_kd_loss(student, cached, labels, **options)
        ids = reads[-1].ids
        assert student.hidden is reads[-1].hidden
        assert labels[:, :-1].equal(ids[:, 1:])
        live = Head(teacher.base_model(ids).last_hidden_state.detach(), teacher.lm_head.weight.detach())
        asked = {name: value for name, value in options.items() if name != "return_metrics"}
        expected = oracle.solve(_double(student), live, labels, **asked).loss
        torch.testing.assert_close(loss.detach().double(), expected, rtol=2e-3, atol=0)  # entries are in float16
        losses.append(loss.item())
        return loss, metrics

    monkeypatch.setattr(module, "fused_kd_loss", compared)
    _three_steps(module, small, "--k", "257")
    assert len(losses) == 3
    out = capsys.readouterr().out
    assert "cache: 1,536 tokens" in out  # of three steps' four blocks
    ((before, _),) = _summaries(out)
    assert before == pytest.approx(_cross_entropy(small[1], _blocks(small)), abs=1e-3)


def test_two_vocabularies(example, small, calls, reads, capsys):
    module = example("two_vocabularies")
    made = calls(module, reads)
    _three_steps(module, small)
    assert [sorted(set(options) & {"valid_vocab", "vocab"}) for _, options in made] == [["valid_vocab"]] * 3 + [
        ["vocab"]
    ] * 3
    for labels, options in made[3:]:  # no KD where the new token, id 257, comes next, nor at the end
        weights = options["kd_token_weights"]
        assert weights[labels == 257].eq(0).all()
        assert weights[:, :-1][labels[:, :-1] < 257].eq(1).all()
    assert any((labels == 257).any() for labels, _ in made[3:])
    assert max(int(read.ids.max()) for read in reads if read.width == TEACHER) < 257  # it reads what it knows
    assert max(int(read.ids.max()) for read in reads if read.width == STUDENT) == 257
    padded, added = _summaries(capsys.readouterr().out)
    assert padded[0] == pytest.approx(_cross_entropy(small[1], _blocks(small)), abs=1e-3)
    assert added[0] > added[1]


def test_hf_trainer(example, small, calls, reads, capsys, tmp_path):
    module = example("hf_trainer")
    made = calls(module, reads)
    _three_steps(module, small)
    _divisors(made)
    ((before, _),) = _summaries(capsys.readouterr().out)
    assert before == pytest.approx(_cross_entropy(small[1], _paragraphs(small)), abs=1e-3)


def test_hf_trainer_evaluates_the_student_alone(example, tmp_path):
    """eval_loss is what plain Trainer's would be, or load_best_model_at_end would choose by the teacher too."""
    rows = [{"input_ids": (ids := list(range(i, i + 12))), "labels": ids} for i in range(5, 13)]
    args = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True)
    given = {"eval_dataset": rows, "data_collator": default_data_collator}
    found = example("hf_trainer").FusedKDTrainer(tiny("llama"), args, teacher=tiny("llama", seed=1), **given)
    expected = Trainer(tiny("llama"), args, **given).evaluate()["eval_loss"]
    assert found.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["hf_trainer", "plain_loop", "own_head_teacher", "two_vocabularies", "trl_trainer"])
def test_adapters_are_trained_or_refused(example, name):
    """One on the head is no part of the weight that the loss takes: it would stay as it is, and nobody be told."""
    peft = pytest.importorskip("peft")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    head_over, ids = example(name).head_over, torch.arange(5, 25)[None]
    for modules in (["q_proj"], ["q_proj", "lm_head"]):
        student = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=modules, init_lora_weights=False))
        given = (student, {"input_ids": ids}) if "trainer" in name else (ids,)
        if "lm_head" in modules:
            with pytest.raises(ValueError, match="PeftModel has an adapter on its head"):
                head_over(student, *given)
            continue
        found = head_over(student, *given)
        torch.testing.assert_close(found.hidden @ found.weight.T, student(ids).logits)
        found.hidden.sum().backward()
        trained = [name for name, p in student.named_parameters() if p.grad is not None]
        assert len(trained) == 2
        assert all("q_proj.lora" in name for name in trained)


def test_lora_chat(example, small, tmp_path_factory, capsys):
    peft, module = pytest.importorskip("peft"), example("lora_chat")
    place, tokenizer = tmp_path_factory.mktemp("lora_chat"), AutoTokenizer.from_pretrained(small[0])
    tokenizer.chat_template, tokenizer.pad_token = module.TEMPLATE, tokenizer.eos_token
    teacher, chats = shutil.copytree(small[0], place / "teacher"), place / "chats.jsonl"
    tokenizer.save_pretrained(teacher)
    rows = [[{"role": "user", "content": f"{i}²?"}, {"role": "assistant", "content": f"{i * i}"}] for i in range(40)]
    chats.write_text("".join(f"{json.dumps({'messages': row})}\n" for row in rows))
    paths = map(str, (teacher, small[1], chats, chats))
    module.main(["--use", *paths, "--max-steps", "3", "--output-dir", str(place / "out")])
    ((before, after),) = _summaries(capsys.readouterr().out)

    for told in (before, after):
        adapted, losses = AutoModelForCausalLM.from_pretrained(small[1]), []
        if told == after:
            adapted = peft.PeftModel.from_pretrained(adapted, place / "out/auto")
        for row in rows:
            mask = {"return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
            made = tokenizer.apply_chat_template(row, **mask)
            with torch.no_grad():
                log_p = adapted.eval()(made["input_ids"]).logits[0, :-1].log_softmax(-1)
            said = made["assistant_masks"][0, 1:].bool()
            losses.append(-log_p.gather(-1, made["input_ids"][0, 1:, None])[said])
        assert torch.cat(losses).mean().item() == pytest.approx(told, abs=1e-3)


def test_trl_trainer(example, small, calls, reads, capsys):
    pytest.importorskip("trl", reason="pip install trl")
    module = example("trl_trainer")
    made = calls(module, reads)
    _three_steps(module, small)
    _divisors(made)
    assert all((labels[:, 0] == IGNORED).all() for labels, _ in made)  # prompts are masked
    assert len(_summaries(capsys.readouterr().out)) == 1


@pytest.fixture
def beside_theirs(monkeypatch):
    """beside_theirs(module) → a list of (β, what was compared on) of every training loss of `FusedLoss`; each is held
    to TRL's own on the same batch, by its value and by the gradient of all that is trained."""

    def record(module):
        made = []
        ours = module.FusedLoss.compute_loss

        def checked(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = ours(self, model, inputs, return_outputs, num_items_in_batch)
            if not torch.is_grad_enabled():
                return loss
            base = super(module.FusedLoss, self)
            theirs = base.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
            names, trained = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
            both = (torch.autograd.grad(one, trained, retain_graph=True) for one in (loss, theirs))
            for name, one, other in zip(names, *both, strict=True):
                assert (one - other).norm() <= 1e-5 * other.norm(), name
            made.append((names, inputs))
            return loss

        monkeypatch.setattr(module.FusedLoss, "compute_loss", checked)
        return made

    return record


def _chats(tokenizer):
    """Rows of unlike length; a tokenizer that pads, with a template."""
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    turns = [(f"{'so ' * (i % 5)}{i}²? ", f"{i * i}") for i in range(24)]
    return [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in turns]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_trl_on_policy_is_their_objective(kind, adapter, beta, example, small, beside_theirs, tmp_path_factory):
    """On what the student wrote, and on the data's text where GKDTrainer's λ leaves it."""
    pytest.importorskip("trl", reason="pip install trl")
    more = {}
    if adapter:
        config = pytest.importorskip("peft").LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
        more["peft_config"] = config
    module = example("trl_on_policy")
    made = beside_theirs(module)
    teacher, student = (AutoModelForCausalLM.from_pretrained(name) for name in small[:2])
    tokenizer = AutoTokenizer.from_pretrained(small[0])
    rows = Dataset.from_dict({"messages": _chats(tokenizer)})
    common = {
        "output_dir": str(tmp_path_factory.mktemp("trl_on_policy")), "max_steps": 3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "bf16": False, "report_to": "none", "save_strategy": "no", "beta": beta,
        "learning_rate": 1e-2,
    }  # fmt: skip
    if kind == "gkd":
        config = module.GKDConfig(**common, lmbda=0.5, temperature=0.7, max_new_tokens=9)
        trainer_class = module.FusedGKDTrainer
    else:
        config = module.DistillationConfig(**common, temperature=0.7, max_completion_length=9)
        trainer_class, rows = module.FusedDistillationTrainer, module.questions(rows)
    trainer = trainer_class(student, teacher, config, train_dataset=rows, processing_class=tokenizer, **more)
    trainer.train()
    assert len(made) == 3 * 2
    assert all(("lora" in name) == adapter for names, _ in made for name in names)
    said = {f"{i * i}" for i in range(24)}
    written = [
        tokenizer.decode(row[row != IGNORED], skip_special_tokens=True)
        for _, inputs in made
        for row in (inputs["labels"] if kind == "gkd" else inputs["completion_ids"])
    ]
    data = [text in said for text in written]
    assert any(data) == (kind == "gkd")
    assert not all(data)


def test_trl_on_policy_labels_only_what_the_student_wrote(example):
    """Padding is read by neither model, and what a tool said is read but not learned."""
    pytest.importorskip("trl", reason="pip install trl")
    with_labels = example("trl_on_policy").with_labels
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    rows = [[0, 5], [0, 1], [7, 8, 9, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    batch = {name: torch.tensor([row]) for name, row in zip(names, rows, strict=True)}
    made = {name: tensor.tolist() for name, tensor in with_labels(batch).items()}
    assert made == {
        "input_ids": [[0, 5, 7, 8, 9, 0]],
        "attention_mask": [[0, 1, 1, 1, 1, 0]],
        "labels": [[IGNORED, IGNORED, 7, IGNORED, 9, IGNORED]],
    }
    with pytest.raises(ValueError, match="pixel_values"):
        with_labels({**batch, "pixel_values": torch.ones(1)})


def test_trl_on_policy(example, small, beside_theirs, tmp_path_factory, capsys):
    pytest.importorskip("trl", reason="pip install trl")
    module = example("trl_on_policy")
    made = beside_theirs(module)
    place, tokenizer = tmp_path_factory.mktemp("trl_on_policy"), AutoTokenizer.from_pretrained(small[0])
    rows = _chats(tokenizer)
    teacher, chats = shutil.copytree(small[0], place / "teacher"), place / "chats.jsonl"
    tokenizer.save_pretrained(teacher)
    chats.write_text("".join(f"{json.dumps({'messages': row})}\n" for row in rows))
    _three_steps(module, (str(teacher), small[1], str(chats), str(chats)))
    assert len(made) == 2 * 3 * 2
    out = capsys.readouterr().out
    assert len(_summaries(out)) == 1
    before, after = re.search(r"reverse KL on its own text: ([\d.]+) before, ([\d.]+) after", out).groups()
    assert before != after


def _divisors(made):
    """Two micro-batches of unlike numbers of targets a step, divided by both's."""
    assert len(made) == 3 * 2
    counts = [int((labels != IGNORED).sum()) for labels, _ in made]
    assert len(set(counts)) > 1
    for i, (_, options) in enumerate(made):
        assert int(options["num_items_in_batch"]) == counts[i // 2 * 2] + counts[i // 2 * 2 + 1]


def test_accelerate_loop(example, small, whole_logits, capsys):
    _three_steps(example("accelerate_loop"), small)
    assert len(whole_logits) == 3 * 2
    assert len({counts for _, _, counts in whole_logits}) > 1
    for (_, items, first), (_, same, second) in zip(whole_logits[::2], whole_logits[1::2], strict=True):
        assert items == same == first + second
    out = capsys.readouterr().out
    step, loss, targets = re.search(r"step (\d): loss ([\d.]+), (\d+) targets", out).groups()
    assert (step, int(targets)) == ("1", whole_logits[0][1])
    assert float(loss) == pytest.approx(whole_logits[0][0] + whole_logits[1][0], abs=1e-3)
    ((before, _),) = _summaries(out)
    assert before == pytest.approx(_cross_entropy(small[1], _paragraphs(small)), abs=1e-3)


def test_lightning_module(example, small, whole_logits, capsys, tmp_path_factory):
    pytest.importorskip("lightning", reason="pip install lightning")
    folder = tmp_path_factory.mktemp("lightning")
    _three_steps(example("lightning_module"), small, "--output-dir", str(folder))
    assert len(whole_logits) == 3
    ((before, _),) = _summaries(capsys.readouterr().out)
    assert before == pytest.approx(_cross_entropy(small[1], _blocks(small)), abs=1e-3)
    (saved,) = folder.rglob("*.ckpt")
    names = torch.load(saved, weights_only=True)["state_dict"]
    assert names
    assert not [name for name in names if "teacher" in name]


def test_kd_trainer(example, small, capsys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kd_trainer") / "run"
    _three_steps(example("kd_trainer"), small, "--output-dir", str(folder))
    out = capsys.readouterr().out
    assert "recipe svd_init" in out
    ((_, after),) = _summaries(out)
    assert after == pytest.approx(_cross_entropy(folder, _blocks(small)), abs=1e-3)
    assert re.search(r"KL\(teacher \|\| student\): [\d.]+ before, [\d.]+ after", out)


@pytest.fixture
def outputs(monkeypatch):
    """A list of (model, arguments, output) of every training call of a DistillationModel."""
    made = []
    forward = DistillationModel.forward

    @functools.wraps(forward)  # whose parameters are the columns that Trainer keeps
    def kept(self, **given):
        output = forward(self, **given)
        if output.loss.requires_grad:
            made.append((self, given, output))
        return output

    monkeypatch.setattr(DistillationModel, "forward", kept)
    return made


def test_moe(example, small, outputs, capsys, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("moe"))
    student = tiny_moe("qwen3_moe", V=257, max_position_embeddings=128, mlp_only_layers=[])
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small[0]).save_pretrained(folder)
    _three_steps(example("moe"), (small[0], folder, *small[2:]))
    balanced = [output.aux_loss is not None for _, _, output in outputs]
    assert balanced == [True] * 3 + [False] * 3
    for (_, given, one), (_, same, other) in zip(outputs[:1], outputs[3:4], strict=True):  # of one start
        assert torch.equal(given["input_ids"], same["input_ids"])
        torch.testing.assert_close(one.loss - other.loss, 0.25 * one.aux_loss, rtol=1e-4, atol=1e-5)
    out = capsys.readouterr().out
    (before, _), (again, _) = _summaries(out)
    assert before == again == pytest.approx(_cross_entropy(folder, _blocks(small)), abs=1e-3)
    shares = [int(share) for share in re.findall(r"the busiest expert gets (\d+)% of the tokens", out)]
    assert len(shares) == 2
    assert all(50 <= share <= 100 for share in shares)  # two of four experts each


def test_vlm(example, outputs, capsys):
    pytest.importorskip("trl", reason="pip install trl")
    example("vlm").main(["--max-steps", "3"])
    assert [model.teacher is None for model, *_ in outputs] == [True] * 3 + [False] * 3
    for _, given, _ in outputs:
        targets = given["labels"][:, 1:]
        assert targets.ne(IGNORED).sum() == given["num_items_in_batch"]
        assert not targets.eq(3).any()  # the place of a picture
        assert given["pixel_values"].shape == (16, 3, 16, 16)
    ((before, after),) = _summaries(capsys.readouterr().out)
    assert after < before


@pytest.mark.parametrize("name", SCRIPTS)
def test_reads_as_one_file_of_public_names(name):
    """No private name of ours, no neighbour, and a docstring that says how it is run."""
    import kdfast
    import kdfast.training

    path = ROOT / "examples" / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert f"python examples/{name}.py" in ast.get_docstring(tree)
    assert f"`{name}.py`" in (ROOT / "examples/README.md").read_text(encoding="utf-8")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("kdfast") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.module not in SCRIPTS
            if node.module.startswith("kdfast"):
                public = {"kdfast": kdfast, "kdfast.training": kdfast.training}[node.module].__all__
                assert {alias.name for alias in node.names} <= set(public)


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_says_what_to_install(name, example, monkeypatch):
    for module in [module for module in sys.modules if module.startswith(f"{NEEDS[name]}.")]:
        monkeypatch.delitem(sys.modules, module)  # found there, its package would not be asked for
    monkeypatch.setitem(sys.modules, NEEDS[name], None)
    with pytest.raises(SystemExit, match=f"pip install {NEEDS[name]}"):
        example(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_whole(name, tmp_path_factory):
    """As typed, with nothing on the command line: the small models are made by the first and shared by the others."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"pip install {NEEDS[name]}")
    cache = tmp_path_factory.getbasetemp() / "cache"
    place = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(cache / "datasets")}
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        env={**os.environ, **place}, cwd=tmp_path_factory.mktemp(name), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    if name == "own_head_teacher":
        table = {line.rsplit(maxsplit=3)[0]: line.rsplit(maxsplit=3)[1:] for line in run.stdout.splitlines()[-4:]}
        assert float(table["own head"][0]) < float(table["none"][0])
        assert float(table["projected"][2]) < 0.5 * float(table["own head"][2])  # small, and no sign of learning
    else:
        assert _summaries(run.stdout)
        for before, after in _summaries(run.stdout):
            assert after < before - (0.1 if name == "lora_chat" else 0.5)  # few chats, and few weights
    if name in ("plain_loop", "lora_chat"):
        without = float(re.search(r"\(([\d.]+) without a teacher", run.stdout).group(1))
        assert _summaries(run.stdout)[0][1] < without
    if name == "kd_trainer":
        kl = re.search(r"KL\(teacher \|\| student\): ([\d.]+) before, ([\d.]+) after", run.stdout)
        assert float(kl.group(2)) < float(kl.group(1))
