"""What docs/recipes.md and docs/log.md say is what the files under bench/results/ have."""

import json
import re
from decimal import ROUND_HALF_UP, Decimal
from statistics import mean

import documents

RESULTS = documents.ROOT / "bench" / "results"
PAGE = documents.source("docs/recipes.md")
LITTLE, PLENTY, MOST = "259,588", "520,192", "2,080,768"
START = "lm_only student_init=svd_blocks learning_rate="


def _text(name):
    return (RESULTS / name).read_text(encoding="utf-8")


def _json(name):
    return json.loads(_text(name))


def _rows(text, columns):
    """Cells of the rows of tables of that many columns; of a heading only those that have text."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == columns + 1]
    return [[cell.strip().replace("`", "").replace("−", "-") for cell in line.split("|")[1:-1]] for line in lines]


def _section(title):
    return re.split(r"\n#+ ", PAGE.split(f"# {title}\n", 1)[1])[0]


def _row(title, columns, start):
    (found,) = (row for row in _rows(_section(title), columns) if row[0].startswith(start))
    return found


def _worth():
    """Return (case, recipe, tokens) → cells of worth.md, without the spread of differences."""
    names = ("seconds", "seeds", "ce", "by_tokens", "by_seconds", "kl")
    found = {}
    for part in _text("worth.md").split("### ")[1:]:
        case = part.split("\n", 1)[0]
        for recipe, tokens, *cells in _rows(part, 8):
            row = dict(zip(names, cells, strict=True))
            found[case, recipe, tokens] = row | {name: row[name].split(" ±")[0] for name in names[3:5]}
    return found


WORTH = _worth()


def _ce(*key):
    return Decimal(WORTH[key]["ce"].split(" ")[0])


def _round(number, places=2):
    """Round as on paper; a difference has its sign."""
    return f"{Decimal(str(number)).quantize(Decimal(10) ** -places, ROUND_HALF_UP):+}"


def _differences(*keys):
    return [[_round(WORTH[key][kind]) for key in keys] for kind in ("by_tokens", "by_seconds")]


def test_runs_of_recipes_are_those_of_worth():
    rows = [row for row in _rows(_section("The most telling runs"), 6) if row[0] != "case"]
    assert len(rows) == 8
    for case, recipe, *cells in rows:
        run = WORTH[case, recipe, LITTLE if case == "little" else PLENTY]
        assert cells == [run[name] for name in ("seconds", "ce", "by_tokens", "by_seconds")], recipe


def test_what_to_take():
    def row(start):
        return _row("What to take", 5, start)

    tokens, seconds = _differences(("plenty", f"{START}5e-4", PLENTY), ("strong", f"{START}2e-3", PLENTY))
    assert row("fresh student of its")[2:4] == [
        f"start alone {tokens[0]}; strong teacher {tokens[1]}", f"{seconds[0]}; {seconds[1]}"
    ]  # fmt: skip
    little = row("little")
    tokens, seconds = _differences(("little", "svd_blocks learning_rate=3e-4", LITTLE))
    assert little[2:4] == [f"{tokens[0]}, start included", *seconds]
    assert little[4] == "not within 4.6 passes; LM only gains little after two"
    assert _ce("little", "lm_only", LITTLE) - _ce("little", "lm_only", "518,922") < 0.05
    assert Decimal(WORTH["little", "svd_init", "518,922"]["by_tokens"]) < -Decimal("0.9")
    tokens, seconds = _differences(
        ("wide", "svd_init", PLENTY), ("strong", "svd_init learning_rate=4e-3", PLENTY),
        ("plenty", "svd_init learning_rate=2e-3", PLENTY),
    )  # fmt: skip
    assert row("fresh student of another")[2:4] == [f"{tokens[0]} to {tokens[2]}", f"{seconds[2]} to {seconds[0]}"]
    tokens, seconds = _differences(("moved", "compressed_head teacher=adapted learning_rate=4e-3", PLENTY))
    assert row("pretrained")[2:4] == tokens + seconds
    lora = row("LoRA")
    with_teacher, without, one_pass, one_pass_without = ("5.540", "5.730", "5.485", "5.460")
    written = "5.540 ± 0.006 to LM only's 5.730 ± 0.010", "800 chats, one pass, live: 5.485 to 5.460"
    assert all(words in _text("tried.md") for words in written)
    assert lora[2] == _round(Decimal(with_teacher) - Decimal(without))
    assert _round(Decimal(one_pass) - Decimal(one_pass_without)) in lora[4]
    assert row("teacher with")[2] == "-0.09 bits per byte, pretrained -0.03"  # test_another_tokenizer has the rows
    fixed, solved = (_recipe("fresh-192", name) for name in ("svd, compressed head", "svd, projector, re-solved"))
    assert solved - fixed == Decimal("0.038")
    assert "within 0.04" in _section("What to take")


def test_what_the_runs_say():
    said = _section("The most telling runs")
    assert _ce("plenty", "lm_only learning_rate=2e-3", MOST) == Decimal("4.052") < _ce("plenty", f"{START}5e-4", PLENTY)
    gained = {
        "little": _ce("little", f"{START}3e-4", LITTLE) - _ce("little", "svd_blocks learning_rate=3e-4", LITTLE),
        "strong": _ce("strong", f"{START}2e-3", PLENTY) - _ce("strong", "svd_blocks learning_rate=2e-3", PLENTY),
        "plenty": _ce("plenty", f"{START}5e-4", PLENTY) - _ce("plenty", "svd_blocks learning_rate=5e-4", PLENTY),
    }
    words = "gains {little} with little text, {strong} under the strong teacher and {plenty} with plenty"
    assert words.format(**{name: _round(gain)[1:] for name, gain in gained.items()}) in said.replace("\n ", "")
    assert "1.4 times the tokens 4.068 (74)" in _text("tried.md")
    assert "4.068 in 74 seconds" in said
    for tokens in (PLENTY, MOST):
        late = WORTH["strong", "svd_init learning_rate=4e-3", tokens]["by_seconds"].replace("-", "−")
        assert f"{late} after {tokens}" in said
    for cache, ce in (("cache_samples=16", "4.190"), ("cache_top_k=64", "4.279")):
        assert str(_ce("little", f"svd_blocks learning_rate=3e-4 {cache}", LITTLE)) == ce
        assert ce in said
    moved = _section("A pretrained student, another text")
    adapted, original = ("compressed_head teacher=adapted learning_rate=4e-3", "compressed_head learning_rate=2e-3")
    for recipe, gain in ((adapted, "0.11"), (original, "0.03")):
        assert _round(WORTH["moved", recipe, PLENTY]["by_tokens"]) == f"-{gain}"
        assert gain in moved
    for teacher in ("", " teacher=adapted"):
        recipe = f"compressed_head{teacher}"
        assert _ce("moved", recipe, PLENTY) < _ce("moved", f"{recipe} kd_until=1", PLENTY)


def test_prices():
    prices = _json("worth.json")["prices"]["little"]
    names = {
        "LM only": "lm_only", "svd_blocks, teacher run once": "svd_blocks", "projector_fixed": "projector_fixed",
        "svd_blocks, live": "svd_blocks precompute_teacher_log_probs=false",
    }  # fmt: skip
    for start, name in names.items():
        _, per_thousand, ratio, before = _row("What a token costs", 4, start)
        assert per_thousand == f"{1000 * prices[name]['per_token']:.3f}"
        assert ratio == f"{prices[name]['per_token'] / prices['lm_only']['per_token']:.1f}"
        assert before == f"{prices[name]['before']:.0f}"
    student, teacher = 12 * 12 * 768**2, 48 * 12 * 1600**2  # 12·H² a layer
    head = 2 * 50257 * 768, 2 * 50257 * 1600
    ratio = 1 + (2 * teacher + head[1]) / (6 * student + 3 * head[0])
    assert f"{ratio:.1f} times LM only" in _section("What a token costs")


def test_on_policy():
    found = _json("on_policy.json")

    def cell(wrong, name):
        x = [run["exact_match"] for run in found[wrong]["runs"] if run["contender"] == name]
        return f"{mean(x):.1%} ({min(x):.1%}–{max(x):.1%})" if x else ""

    shown = [row for row in _rows(_section("On-policy"), 3) if "%–" in row[1]]
    whole = [row[:3] for row in _rows(_text("on_policy.md"), 4) if "%–" in row[1]]
    assert (len(shown), len(whole)) == (4, 11)
    for name, *cells in shown + whole:
        assert cells == [cell("0.3", name), cell("1", name)], name
    for wrong in found:  # "nor did reverse KL beat forward KL"
        exact = {name: cell(wrong, name) for name in {run["contender"] for run in found[wrong]["runs"]}}
        for name in exact:
            if "reverse" in name and (forward := re.sub("(skew )?reverse", "forward", name)) in exact:
                assert float(exact[name].split("%")[0]) < float(exact[forward].split("%")[0])


def test_another_tokenizer():
    runs = _json("tokenizers.json")["runs"]

    def cell(tokenizer, start, contender, rate):
        x = [
            run["bits_per_byte"] for run in runs
            if (run["tokenizer"], run["start"], run["contender"], run["rate"]) == (tokenizer, start, contender, rate)
        ]  # fmt: skip
        return f"{mean(x):.3f}" + (f" ± {(max(x) - min(x)) / 2:.3f}" if len(x) > 1 else "")

    best = {}
    student = ""
    for name, recipe, _, bits, *_ in _rows(_text("tokenizers.md"), 6)[1:]:
        student = name or student
        tokenizer, start = student.split(", ")
        contender, rate, *more = recipe.replace(", three times the tokens", " more").split(" ")
        assert bits == cell(tokenizer, start, f"{contender}{' max_steps=1152' if more else ''}", float(rate)), recipe
        best.setdefault((student, contender), bits)
    shown = _rows(_section("Another tokenizer"), 4)[1:]
    assert len(shown) == 4
    for student, shared, *cells in shown:
        assert cells == [best[student, "lm_only"], best[student, "shared_tokens"]]
        assert (
            shared in re.search(rf"`{student.split(',')[0]}`, (?:byte|Unigram).*", _text("tokenizers.md"), re.S).group()
        )
    gained = [
        _round(Decimal(ours.split(" ")[0]) - Decimal(alone.split(" ")[0])) for _, _, alone, ours in shown if "64" in _
    ]
    assert gained == ["-0.09", "-0.03"]
    (price,) = {run["times_lm_only"] for run in runs if run["tokenizer"] == "bytes" and "shared" in run["contender"]}
    assert f"costs {price:.1f} times LM only in products; three times the tokens bring LM only to " + cell(
        "bytes", "fresh", "lm_only max_steps=1152", 0.002
    ) in _section("Another tokenizer")


def _recipe(case, name, cell=3):
    """Return a mean of bench/results/recipes.md: 3 the CE, 6 KL(true‖student), 7 KL(true‖stand-in)."""
    part = _text("recipes.md").split(f"### {case}\n")[1].split("### ")[0]
    (row,) = (row for row in _rows(part, 10) if row[0] == name)
    return Decimal(row[cell].split(" ")[0])


def test_a_projector_cannot_keep_up():
    said = _section("Why a trained projector through the student's embedding cannot keep up").replace("\n", " ")
    case = "fresh-192"
    followed, solved, trained = (
        f"svd, {x}" for x in ("anchor true teacher", "projector, re-solved", "projector, KD gradient")
    )
    assert (
        f"at a KL of {_recipe(case, followed, 7)} from it; solved again every 16 steps, at {_recipe(case, solved, 7)}"
        in said
    )
    assert f"the KD gradient ({_recipe(case, trained, 7)})" in said
    assert (
        f"its student reaches {_recipe(case, 'svd, compressed head')}, with the solved projector "
        f"{_recipe(case, solved)}, with the trained one {_recipe(case, trained)}"
    ) in said


def test_starts():
    said = _section("Starts, before any training")
    kls = {}
    for run in _json("recipes.json")["runs"]:
        for start in run["starts"] or []:
            kls.setdefault(start["what"].rpartition("=")[2].strip("'"), []).append(start["kl"])
    assert f"{max(kls['svd']):.3f} with `svd`" in said
    assert f"{min(kls['lstsq']):.2f}–{max(kls['lstsq']):.2f} with `lstsq`" in said
    assert "`svd` 21 s, `lstsq` 12 s" in _text("tried.md")
    assert "21 s and 12 s" in said


def test_the_gap_that_a_start_closes():
    said = _section("The setting")
    for case, recipe, tokens, teacher in (
        ("little", f"{START}3e-4", LITTLE, "4.036"), ("strong", f"{START}2e-3", PLENTY, "3.400")
    ):  # fmt: skip
        alone = _ce(case, "lm_only" if case == "little" else "lm_only learning_rate=2e-3", tokens)
        share = (alone - _ce(case, recipe, tokens)) / (alone - Decimal(teacher))
        assert teacher in said
        assert teacher in _text("tried.md")
        assert f"{share:.0%}" in said


def test_the_log_keeps_to_the_figures():
    """Every number of the log is in a file of results."""
    number = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-\d+)?")

    def numbers(text):
        return {found.replace(",", "") for found in number.findall(text.replace("−", "-"))}

    results = "".join(_text(name) for name in ("tried.md", "recipes.md", "worth.md", "tokenizers.md"))
    assert numbers(documents.prose("docs/log.md")) - numbers(results) == set()
