"""Student and teacher of one tokenizer padded differently, and of two: in Python, on the command line, in a cache."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_models import tiny
from tokenizers import AddedToken, Tokenizer, models
from training_fixtures import config, rows  # noqa: F401
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kdfast.cli.main import main
from kdfast.training import DistillationModel, KDTrainer, TeacherCache, cache_teacher, load_student, load_teacher
from kdfast.training.data.tokenizers import count_ids

WORDS = [f"w{i}" for i in range(67)]


def make_tokenizer(words=WORDS, gap=0, **special):
    """One id a word; the last one is left out by `gap` ids."""
    vocabulary = {word: i for i, word in enumerate(words)}
    vocabulary[words[-1]] += gap
    special = {"eos_token": words[1], "pad_token": words[2]} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])), **special
    )


def save(folder, tokenizer, V, width=16, seed=0, family="llama"):
    tiny(family, V=V, width=width, seed=seed).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def swapped():
    words = list(WORDS)
    words[5], words[9] = words[9], words[5]
    return make_tokenizer(words)


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("given", ["processing_class", "beside the student"])
def test_one_tokenizer_padded_differently(tmp_path, rows, config, capsys, gap, given):  # noqa: F811
    tokenizer = make_tokenizer(gap=gap)
    ids = 67 + gap
    assert (len(tokenizer), count_ids(tokenizer)) == (67, ids)
    student = load_student(save(tmp_path / "s", tokenizer, 72), tokenizer=tokenizer)
    if given == "processing_class":
        student.name_or_path = ""
    teacher = load_teacher(save(tmp_path / "t", tokenizer, 80, 24, 1), tokenizer=tokenizer)
    data = rows(4)
    trainer = KDTrainer(
        student.double(), config(recipe="teacher_head", temperature=1.5), teacher=teacher.double(), train_dataset=data,
        eval_dataset=data, processing_class=tokenizer if given == "processing_class" else None,
    )  # fmt: skip
    assert trainer.model.valid_vocab == ids
    assert f"valid_vocab={ids}: the student's head has 72 rows, the teacher's 80, of one tokenizer" in (
        capsys.readouterr().out
    )
    found = trainer.evaluate()
    batch = torch.stack([row["input_ids"] for row in data])
    labels = torch.stack([row["labels"] for row in data])[:, 1:].flatten()
    kept = labels != -100
    with torch.no_grad():
        z, y = (
            m(batch).logits[:, :-1, :ids].flatten(0, 1)[kept] for m in (trainer.model.student, trainer.model.teacher)
        )
    p, q = (y / 1.5).log_softmax(-1), (z / 1.5).log_softmax(-1)
    assert found["eval_ce"] == pytest.approx(F.cross_entropy(z, labels[kept]).item(), rel=1e-6)
    assert found["eval_kd"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-6)


def test_auto_takes_its_teacher(tmp_path, rows, config, capsys):  # noqa: F811
    tokenizer = make_tokenizer()
    student, teacher = load_student(save(tmp_path / "s", None, 72)), load_teacher(save(tmp_path / "t", tokenizer, 80))
    trainer = KDTrainer(
        student, config(recipe="auto"), teacher=teacher, train_dataset=rows(30), processing_class=tokenizer
    )
    assert trainer.model.recipe.name == "svd_blocks"
    assert trainer.model.valid_vocab == 67
    trainer.train()
    del student
    tokenizer.save_pretrained(tmp_path / "s")
    student = load_student(tmp_path / "s")
    assert DistillationModel(student, teacher).valid_vocab == 67
    assert DistillationModel(student, teacher, valid_vocab=60).valid_vocab == 60, "what is given stays"


@pytest.mark.parametrize("recipe", ["auto", "teacher_head", "compressed_head"])
def test_where_it_is_not_known_to_be_one_tokenizer(tiny, rows, config, recipe):  # noqa: F811
    with pytest.raises(ValueError, match=f"recipe.*{recipe}.*80 rows and the student's 67.*valid_vocab.*other words"):
        KDTrainer(tiny(), config(recipe=recipe), teacher=tiny(V=80, seed=1), train_dataset=rows(4))
    with pytest.raises(ValueError, match="80 rows and the student's 67"):
        DistillationModel(tiny(), tiny(V=80, seed=1), recipe=recipe)
    asked_for = KDTrainer(tiny(), config(recipe="lm_only"), teacher=tiny(V=80, seed=1), eval_dataset=rows(4))
    assert "eval_kl_teacher_student" not in asked_for.evaluate()


@pytest.mark.parametrize("V", [67, 72])
@pytest.mark.parametrize("recipe", ["auto", "lm_only", "teacher_head", "projector", "probe"])
def test_other_words(tmp_path, rows, config, recipe, V):  # noqa: F811
    ours = make_tokenizer()
    student, teacher = load_student(save(tmp_path / "s", ours, 67)), load_teacher(save(tmp_path / "t", swapped(), V))
    said = r"'.*t' has other tokens than the text's, of 2 ids: 5 is 'w5' in the text's and 'w9' there, 9 is 'w9'"
    for given in ({"processing_class": ours}, {}):
        with pytest.raises(ValueError, match=f"^teacher: .*{said}.*another teacher"):
            KDTrainer(student, config(recipe=recipe), teacher=teacher, train_dataset=rows(4), **given)
    with pytest.raises(ValueError, match=said):
        DistillationModel(student, teacher, recipe=recipe)
    if V == 67:
        with pytest.raises(ValueError, match=r"^student: .*s' has other tokens than the text's"):
            DistillationModel(student, teacher, recipe=recipe, tokenizer=swapped())
        fresh = AutoModelForCausalLM.from_config(student.config)
        model = DistillationModel(fresh, teacher, recipe=recipe, tokenizer=swapped())
        with pytest.raises(ValueError, match=said):
            KDTrainer(model, config(), train_dataset=rows(4), processing_class=ours)
    with pytest.raises(ValueError, match=f"^teacher_model_name_or_path: .*{said}"):
        load_teacher(tmp_path / "t", tokenizer=ours)
    with pytest.raises(ValueError, match=f"^model_name_or_path: .*{said}"):
        load_student(tmp_path / "t", tokenizer=ours)
    with pytest.raises(ValueError, match=f"^tokenizer: .*{said}"):
        cache_teacher(teacher, {"train": rows(2)}, tmp_path / "cache", k=4, tokenizer=ours)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_text_of_other_words_than_the_students(tmp_path, rows, config, with_teacher):  # noqa: F811
    student = load_student(save(tmp_path / "s", swapped(), 67))
    given = {"teacher": tiny(seed=1, width=24)} if with_teacher else {}
    options = {"train_dataset": rows(4), "processing_class": make_tokenizer()}
    said = "^student: the tokenizer of .*s' has other tokens than the text's, of 2 ids"
    for recipe in ("lm_only", "auto"):
        with pytest.raises(ValueError, match=said):
            KDTrainer(student, config(recipe=recipe), **given, **options)
    with pytest.raises(ValueError, match=said):
        KDTrainer(DistillationModel(student, recipe="lm_only"), config(), **options)
    fresh = AutoModelForCausalLM.from_config(student.config)
    KDTrainer(fresh, config(recipe="lm_only"), **given, **options)
    # a fresh one with its teacher's tokens: the text's tokenizer has to be named
    teacher = load_teacher(save(tmp_path / "t", make_tokenizer(), 67))
    with pytest.raises(ValueError, match="processing_class= tells KDTrainer the text's"):
        KDTrainer(fresh, config(recipe="lm_only"), teacher=teacher, train_dataset=rows(4))
    KDTrainer(fresh, config(recipe="lm_only"), teacher=teacher, **options)


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_under_other_names(tmp_path, rows, config, capsys, special):  # noqa: F811
    def with_added(*names):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([AddedToken(name, special=special) for name in names])
        return tokenizer

    ours, theirs = with_added("<r0>", "<r1>", "<eot>"), with_added("<pad>", "<tool>", "<eot>")
    student = load_student(save(tmp_path / "s", ours, 72))
    teacher = save(tmp_path / "t", theirs, 80, 24, 1)
    if not special:  # words that each has added for itself
        with pytest.raises(ValueError, match="other tokens than the text's, of 2 ids: 67 is '<r0>'"):
            load_teacher(teacher, tokenizer=ours)
        return
    trainer = KDTrainer(
        student, config(recipe="teacher_head"), teacher=load_teacher(teacher), train_dataset=rows(4),
        processing_class=ours,
    )  # fmt: skip
    assert trainer.model.valid_vocab == 70
    line = "has other names for 2 special tokens than the text's: 67 is '<r0>' in the text's and '<pad>' there"
    assert capsys.readouterr().out.count(line) == 1
    words = [*WORDS[:5], WORDS[9], *WORDS[6:9], WORDS[5], *WORDS[10:]]
    other = make_tokenizer(words)
    other.add_tokens([AddedToken("<pad>", special=True)])
    with pytest.raises(ValueError, match="of 2 ids: 5 is 'w5'"):  # ordinary ones are still compared
        load_teacher(save(tmp_path / "o", other, 72), tokenizer=ours)


def test_what_does_not_make_it_another_tokenizer(tmp_path):
    ours, theirs = make_tokenizer(), make_tokenizer(chat_template="{{ messages }}", model_max_length=7, pad_token="w3")
    theirs.padding_side = "left"
    theirs.add_tokens([AddedToken("<more>", special=True)])
    teacher = save(tmp_path / "t", theirs, 72)
    load_teacher(teacher, tokenizer=ours)
    words = [*WORDS[:-2], "<other>", "<names>"]
    make_tokenizer(words).save_pretrained(teacher)
    with pytest.raises(ValueError, match="no id from 65 on, valid_vocab=65 leaves those out"):
        load_teacher(teacher, tokenizer=ours)
    student = load_student(save(tmp_path / "s", ours, 72), tokenizer=ours)
    teacher = load_teacher(teacher, tokenizer=ours, valid_vocab=65)
    assert DistillationModel(student, teacher, recipe="teacher_head", valid_vocab=65).valid_vocab == 65


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    # for gpt2 transformers makes one up there, of <|endoftext|> alone
    teacher = load_teacher(save(tmp_path / "t", None, 67, family="gpt2"), tokenizer=make_tokenizer())
    student = load_student(save(tmp_path / "s", make_tokenizer(), 67), tokenizer=make_tokenizer())
    assert DistillationModel(student, teacher, recipe="teacher_head").valid_vocab is None


def test_a_fresh_student_has_a_row_for_every_id():
    settings = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
    assert load_student(student_config=settings, tokenizer=make_tokenizer(gap=3)).config.vocab_size == 70


@pytest.mark.parametrize("V", [67, 72])
def test_a_cache_of_a_padded_teacher(tmp_path, rows, config, V):  # noqa: F811
    tokenizer, data, told = make_tokenizer(), rows(6), []
    teacher = load_teacher(save(tmp_path / "t", tokenizer, 80, 24, 1), tokenizer=tokenizer)
    cache_teacher(
        teacher, {"train": data}, tmp_path / "cache", k=67, dtype="float32", tokenizer=tokenizer, tell=told.append
    )
    assert told[0] == "valid_vocab=67: the teacher's head has 80 rows, the tokenizer 67 ids"
    blocks = TeacherCache(tmp_path / "cache").dataset("train", data)
    student = save(tmp_path / "s", None, V)
    metrics = []
    for recipe, learned, given in (("auto", blocks, {}), ("teacher_head", data, {"teacher": teacher})):
        trainer = KDTrainer(
            load_student(student), config(recipe=recipe, temperature=2.0), processing_class=tokenizer,
            train_dataset=learned, eval_dataset=learned, **given,
        )  # fmt: skip
        assert trainer.model.valid_vocab == 67
        metrics.append(trainer.evaluate())
    for name in ("eval_kd", "eval_ce", "eval_kl_teacher_student"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5)
    plain = KDTrainer(
        load_student(student), config(recipe="lm_only"), processing_class=tokenizer, train_dataset=data,
        eval_dataset=blocks if V == 67 else {"kept": blocks},
    )  # fmt: skip
    assert plain.model.valid_vocab == 67
    with pytest.raises(ValueError, match="valid_vocab"):  # without a tokenizer nobody knows
        KDTrainer(load_student(student), config(recipe="auto"), train_dataset=blocks)


def test_a_cache_of_other_words(tmp_path, rows, config):  # noqa: F811
    data, teacher = rows(6), tiny(seed=1)
    cache_teacher(teacher, {"train": data}, tmp_path / "cache", k=4, tokenizer=make_tokenizer())
    blocks = TeacherCache(tmp_path / "cache").dataset("train", data)
    student = load_student(save(tmp_path / "s", swapped(), 67))
    for given in ({}, {"processing_class": swapped()}):
        with pytest.raises(ValueError, match=r"has other tokens \("):
            KDTrainer(student, config(recipe="auto"), train_dataset=blocks, **given)
    with pytest.raises(ValueError, match=r"^student: .*other tokens than the text's"):
        KDTrainer(student, config(recipe="auto"), train_dataset=blocks, processing_class=make_tokenizer())
    fresh = AutoModelForCausalLM.from_config(student.config)  # with the folder's configuration alone
    assert fresh.name_or_path == student.name_or_path
    KDTrainer(fresh, config(recipe="auto"), train_dataset=blocks, processing_class=make_tokenizer())


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "text.txt").write_text("w3")
    from byte_tokenizer import make_tokenizer as make_bytes  # which splits a text

    (tmp_path / "text.txt").write_text("".join(f"{i}: {i * i} is the square of {i}\n" for i in range(60)))
    save("student", make_bytes(), 260)
    save("teacher", make_bytes(), 272, 24, 1)
    settings = {
        "model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "train_file": "text.txt",
        "max_length": 16, "output_dir": "out", "max_steps": 2, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_on_the_command_line(place, capsys):
    assert main(["distill", "c.yaml"]) == 0
    out = capsys.readouterr().out
    assert "valid_vocab=257: the student's head has 260 rows, the teacher's 272, of one tokenizer" in out
    assert json.loads((place / "out/summary.json").read_text())["recipe"] != "lm_only"

    assert main(["cache", "c.yaml", "--teacher_cache", "kept"]) == 0
    assert "valid_vocab=257: the teacher's head has 272 rows" in capsys.readouterr().out
    assert main(["distill", "c.yaml", "--teacher_cache", "kept", "--output_dir", "from_cache"]) == 0
    assert "valid_vocab=257: the student's head has 260 rows, the cached teacher's 272" in capsys.readouterr().out

    alone = ["--recipe", "lm_only", "--output_dir", "alone"]
    assert main(["distill", "c.yaml", "--teacher_cache", "kept", *alone]) == 0
    assert "'eval_kl_teacher_student': " in capsys.readouterr().out

    assert main(["plan", "--student", "student", "--teacher", "teacher"]) == 0
    assert "the teacher's head has 272 rows: planned for the student's; a run takes valid_vocab=257" in (
        capsys.readouterr().out
    )
    files = list((place / "teacher").glob("tokenizer*"))
    for file in files:
        file.rename(place / file.name)
    assert main(["distill", "c.yaml", "--output_dir", "unknown"]) == 2
    assert "recipe='auto' has no use for this teacher: the teacher's head has 272 rows" in capsys.readouterr().err
    for file in files:
        (place / file.name).rename(file)


def test_ids_that_a_head_has_no_rows_for_are_no_valid_vocab(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    student, teacher = save("student", make_tokenizer(), V=67), save("teacher", make_tokenizer(), V=64)
    with pytest.raises(ValueError, match="the teacher's head has 64 rows and the student's 67"):
        DistillationModel(load_student(student), load_teacher(teacher))
    assert main(["plan", "--student", student, "--teacher", teacher]) == 0
    assert "a run takes valid_vocab, if they have one tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize("V", [260, 272])
@pytest.mark.parametrize("command", ["distill", "cache", "plan"])
def test_other_words_on_the_command_line(place, capsys, command, V):
    tiny(V=V, width=24, seed=1).save_pretrained("teacher")
    tokenizer = json.loads((place / "teacher/tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (place / "teacher/tokenizer.json").write_text(json.dumps(tokenizer))
    options = ["c.yaml", "--teacher_cache", "kept", "--recipe", "auto"][: 3 if command == "cache" else 1]
    code = main([command, *(["--student", "student", "--teacher", "teacher"] if command == "plan" else options)])
    if command == "distill":  # whose teacher reads its own
        assert code == 0
        assert json.loads((place / "out/summary.json").read_text())["recipe"] == "shared_tokens"
        return
    assert code == 2
    assert "'teacher' has other tokens than the text's, of 2 ids:" in capsys.readouterr().err
