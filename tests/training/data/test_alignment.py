"""Shared strings of two tokenizers, and rows aligned with the other's: against places in the text, by character."""

import itertools

import pytest
from chats import UNMARKED, assistant, user
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast
from two_tokenizers import CODE, ENGLISH, byte_level, sentencepiece

from kdfast.training.data.alignment import CHANGED, NO_MARK, NOWHERE, UNKNOWN, Aligner, Span
from kdfast.training.data.shared_vocabulary import TokenTable, share_vocabulary, token_lengths

TOKENIZERS = {
    "bytes": lambda: byte_level(),
    "bytes, of code": lambda: byte_level(320, CODE),
    "bytes, blank and start": lambda: byte_level(add_prefix_space=True, start=True),
    "pieces": lambda: sentencepiece(),
    "pieces, of English": lambda: sentencepiece(600, ENGLISH),
    "pieces, not legacy": lambda: sentencepiece(legacy=False),
    "pieces, no blank, no start": lambda: sentencepiece(legacy=False, prefix=False, start=False),
    "unigram": lambda: sentencepiece(texts=ENGLISH, kind="Unigram"),
}
TOKENIZERS = {name: make() for name, make in TOKENIZERS.items()}
TEXTS = {
    "words": "the quick words of the story, 1984 and 12345",
    "leading blanks": "   the words",
    "one leading blank": " the words",
    "emoji": "family 👩‍👩‍👧‍👦, flag 🇩🇪, thumb 👍🏽 words",
    "combining marks": "e\u0301a\u0308 n\u0303o q\u0323\u0307",
    "CRLF and tabs": "a line\r\n\tthe next\r\n\r\n\t\t x\n",
    "code": "def words(text):\n    return [word for word in text]\n\n\nclass A: pass",
    "Chinese": "数字和词语, 中文的文本。 mixed with words 字",
    "nothing but blanks": "  \n  \t ",
    "rare": "\u0000\u200b\ufeff\U0010ffff ﬁ ½ ①",
    "special tokens' names": "a </s> b <start> c <0x41> d",
}


def places(tokenizer, text):
    """Ids of a text and, by the tokenizer's own account, where each ends: None within a character, or within several
    that it has spelled in bytes."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    starts = [start for start, _ in spans[1:]] + [len(text)]
    unknown = {at for span in spans if spans.count(span) > 1 for at in range(span[0] + 1, span[1])}
    ends = [end if start >= end else None for (_, end), start in zip(spans, starts, strict=True)]
    return encoded["input_ids"], ends, unknown


@pytest.mark.parametrize("ours", TOKENIZERS)
def test_character_by_character(ours):
    for theirs, name in itertools.product(TOKENIZERS, TEXTS):
        if theirs != ours:
            check_by_character(ours, theirs, name)


def check_by_character(ours, theirs, name):
    text = TEXTS[name]
    if "special" in name and "unigram" in (ours, theirs):
        text = text.replace("</s>", "").replace("<0x41>", "")  # which Unigram takes for its own; below
    student, teacher = (TokenTable("tokenizer", TOKENIZERS[one]) for one in (ours, theirs))
    if student.spares:
        text = text.removeprefix(" ") if "one leading" in name else text  # its ids do not tell whether there is one
    ids, ends, _ = places(student.tokenizer, text)
    other, other_ends, unknown = places(teacher.tokenizer, text)
    [row] = Aligner(student, teacher, documents=True)([ids])
    start = [] if teacher.start is None else [teacher.start]
    assert row.lost == ""
    assert len(row.positions) == len(ids)
    assert row.ids == ([*start, *other][: max(row.positions, default=NOWHERE) + 1] or [0])
    for t, (end, found) in enumerate(zip(ends, row.positions, strict=True)):
        if end is not None and end not in unknown and ends.count(end) == 1:
            expected = other_ends.index(end) + len(start) if end in other_ends else NOWHERE
            assert found == expected, f"after {text[:end]!r}"
        if found != NOWHERE:  # and by the bytes, within characters too
            read = [b"".join(map(student.__getitem__, ids[: t + 1]))]
            read.append(b"".join(teacher[i] for i in row.ids[: found + 1] if i != teacher.start))
            # each may have put a blank before the text
            both = [
                {one, one[one.startswith(b" ") and table.prefixed :]}
                for one, table in zip(read, (student, teacher), strict=True)
            ]
            assert any(text.encode().startswith(one) for one in both[0] & both[1])


def aligner(ours="bytes", theirs="pieces", documents=True, **options):
    tables = (TokenTable("tokenizer", TOKENIZERS.get(one, one)) for one in (ours, theirs))
    return Aligner(*tables, documents=documents, **options)


def shown(align, ids, row):
    """The student's tokens, each with what the teacher has read last where it has read the same."""
    ours, theirs = (
        lambda i, table=table: table[i] or table.tokenizer.decode([i]).encode()
        for table in (align.student, align.teacher)
    )
    return [(ours(i), None if at == NOWHERE else theirs(row.ids[at])) for i, at in zip(ids, row.positions, strict=True)]


def test_starts_and_ends_by_their_role():
    align = aligner("bytes, blank and start", "pieces")
    ids = align.student.tokenizer("the words<end>")["input_ids"] + align.student.tokenizer("of the<end>")["input_ids"]
    [row] = align([ids])
    assert align.teacher.tokenizer.decode(row.ids).count("</s>") == 2
    found = shown(align, ids, row)
    assert found[0] == (b"<start>", b"<s>"), "a blank comes next in both"
    assert [pair for pair in found if b"<end>" in pair] == [(b"<end>", None), (b"<end>", b"</s>")]
    assert found.count((b"<start>", b"<s>")) == 2, "and behind an end, where each has its start too"
    align = aligner("bytes", "pieces")
    ids = align.student.tokenizer("the words<end>words of<end>")["input_ids"]
    [row] = align([ids])
    assert shown(align, ids, row)[ids.index(0)] == (b"<end>", None), "a blank comes next in one"
    align = aligner("bytes", "bytes, of code")
    [row] = align([ids])
    assert shown(align, ids, row)[ids.index(0)] == (b"<end>", b"<end>")
    align = aligner("pieces", "bytes, of code")
    ids = align.student.tokenizer("the words")["input_ids"]
    [row] = align([ids])
    assert row.positions[0] == NOWHERE, "the teacher puts nothing before a text"
    assert align.teacher.tokenizer.decode(row.ids) == "the words", "without the blank that the student puts there"


def test_a_teacher_without_an_end():
    other = byte_level(320, CODE)
    other.eos_token = None
    align = aligner("bytes", other)
    ids = align.student.tokenizer("the words<end>the words")["input_ids"]
    [row] = align([ids])
    end = ids.index(0)
    assert row.lost == NO_MARK
    assert row.positions[end - 2] >= 0
    assert set(row.positions[end - 1 :]) == {NOWHERE}, (
        "what comes next in the student's row never does in the teacher's"
    )


@pytest.mark.parametrize("theirs", TOKENIZERS)
def test_blocks_that_begin_within_a_character(theirs):
    """Byte by byte, whatever a block's border cuts."""
    align = aligner("bytes, blank and start", theirs, documents=False)
    stream = align.student.tokenizer("数字和词语 the words, 👩‍👩‍👧 of\n\n the", add_special_tokens=False)["input_ids"]
    for start in range(12):
        ids = stream[start : start + 20]
        [row] = align([ids])
        assert row.lost == ""
        read = b"".join(align.teacher[i] for i in row.ids if i != align.teacher.start)
        ours = b"".join(map(align.student.__getitem__, ids))
        assert ours.startswith(read) or (align.teacher.prefixed and ours.startswith(read.removeprefix(b" ")))
        assert sum(at != NOWHERE for at in row.positions) > len(ids) / 3


def test_a_real_blank_at_a_blocks_start():
    align = aligner("pieces", "bytes", documents=False)
    ids = align.student.tokenizer("the words of", add_special_tokens=False)["input_ids"]
    [row] = align([ids])
    assert b"".join(map(align.teacher.__getitem__, row.ids)).startswith(b" the words")
    [row] = aligner("pieces", "bytes")([ids])
    assert b"".join(map(align.teacher.__getitem__, row.ids)).startswith(b"the words")


@pytest.mark.parametrize(
    ("normalizer", "text", "kept"),
    [
        (normalizers.NFC(), "the words e\u0301 and more", "the words "),
        (normalizers.NFKC(), "the words ﬁ and more", "the words "),
        (normalizers.Lowercase(), "the words of The words", "the words of "),
        (normalizers.Strip(), "the words  ", "the words"),
    ],
)
def test_text_that_a_normalizer_changes(normalizer, text, kept):
    teacher = byte_level(320, CODE, normalizer=normalizer)
    align = aligner("bytes", teacher)
    ids = align.student.tokenizer(text + "<end>")["input_ids"]
    [row] = align([ids])
    assert row.lost == CHANGED
    assert any(at != NOWHERE for at in row.positions)
    for t, at in enumerate(row.positions):
        if at != NOWHERE:
            assert kept.startswith(align.student.tokenizer.decode(ids[: t + 1]))
    align = aligner(byte_level(320, CODE, normalizer=normalizer), "bytes")  # the student's: both read what it reads
    ids = align.student.tokenizer(text + "<end>")["input_ids"]
    [row] = align([ids])
    assert row.lost == ""
    assert row.positions[-1] != NOWHERE


def test_what_has_no_bytes():
    student = sentencepiece()
    backend = Tokenizer.from_str(
        student.backend_tokenizer.to_str().replace('"byte_fallback":true', '"byte_fallback":false')
    )
    student = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", bos_token="<s>")
    align = aligner(student, "bytes")
    ids = student("return 字 words")["input_ids"]
    [row] = align([ids])
    unknown = ids.index(student.unk_token_id)
    assert row.lost == UNKNOWN
    assert any(at != NOWHERE for at in row.positions[:unknown])
    assert set(row.positions[unknown:]) == {NOWHERE}
    [row] = aligner("bytes", student)([TOKENIZERS["bytes"]("return 字 words")["input_ids"]])
    assert row.lost == CHANGED
    [row] = aligner("bytes", "unigram")([TOKENIZERS["bytes"]("return </s> words")["input_ids"]])
    assert row.lost == CHANGED, "it would read an end of text"


def test_rows_are_cut_to_what_the_teacher_holds():
    ids = TOKENIZERS["bytes"]("the words of the story " * 5)["input_ids"]
    [whole] = aligner()([ids])
    [row] = aligner(length=20)([ids])
    assert len(row.ids) <= 20 < len(whole.ids)
    assert row.ids == whole.ids[: len(row.ids)]
    assert row.positions == [at if at < 20 else NOWHERE for at in whole.positions]
    assert aligner()([[]]) == [([0], [], "")]


@pytest.mark.parametrize("theirs", ["pieces", "bytes, of code", "pieces, not legacy"])
def test_chats_align_on_what_the_assistant_says(theirs):
    student, teacher = TOKENIZERS["bytes"], TOKENIZERS[theirs]
    messages = [user("words?"), assistant("the words, 中文 👍"), user("the words?"), assistant("words")]
    templates = (
        UNMARKED,
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}",
    )
    text, other = (
        one.apply_chat_template(messages, chat_template=template, tokenize=False)
        for one, template in zip((student, teacher), templates, strict=True)
    )
    ids, other_ids = (
        one.apply_chat_template(messages, chat_template=template, tokenize=True)["input_ids"]
        for one, template in zip((student, teacher), templates, strict=True)
    )
    align = aligner("bytes", theirs)
    spans, at, there = [], 0, 0
    for message in messages:
        at, there = text.index(message["content"], at), other.index(message["content"], there)
        if message["role"] == "assistant":
            spans.append(Span(message["content"].encode(), len(text[:at].encode()), len(other[:there].encode())))
        at, there = at + len(message["content"]), there + len(message["content"])
    row = align.chat(ids, text, other_ids, other, spans)
    assert row.lost == ""
    found = [t for t, place in enumerate(row.positions) if place != NOWHERE]
    assert found
    ours, theirs = align.student.offsets(ids, text), align.teacher.offsets(other_ids, other)
    for t in found:
        assert any(
            0 <= ours[t] - span.student == theirs[row.positions[t]] - span.teacher < len(span.text) for span in spans
        )
    pairs = {(ours[t], theirs[row.positions[t]]) for t in found}
    every = {
        (span.student + n, span.teacher + n) for span in spans for n in range(len(span.text))
        if span.student + n in ours and span.teacher + n in theirs
    }  # fmt: skip
    assert pairs == every


def test_which_strings_are_shared():
    student, teacher = (TokenTable("tokenizer", TOKENIZERS[one]) for one in ("bytes", "pieces"))
    shared = share_vocabulary(student, teacher)
    pairs = list(zip(shared.student.tolist(), shared.teacher.tolist(), strict=True))
    names = {(student.tokenizer.convert_ids_to_tokens(i), teacher.tokenizer.convert_ids_to_tokens(j)) for i, j in pairs}
    assert {("Ġ", "▁"), ("Ċ", "<0x0A>"), ("ä", "<0xE4>"), ("x", "x"), ("<end>", "</s>")} <= names
    assert ("x", "<0x78>") not in names, "an ordinary token before the byte"
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert all(student[i] == teacher[j] for i, j in pairs[1:])
    mask, index = shared.mask(500), shared.index(500)
    assert mask.nonzero().flatten().tolist() == [i for i, _ in pairs]
    assert index[mask].tolist() == [j for _, j in pairs]
    assert not index[~mask].any()
    assert "of the student's 355 ids and of the teacher's 412" in shared.lines[0]
    assert "numbers of several digits 0%" in shared.lines[0]
    assert shared.lines[1].startswith(
        "warning: 11 of the 11 numbers of several digits that are one token of the student's"
    )


def test_added_tokens_and_those_without_a_role():
    ours, theirs = byte_level(300), sentencepiece()
    ours.add_tokens(["wholeword"])
    theirs.add_tokens(["wholeword", "x"])
    for one in (ours, theirs):
        one.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    student, teacher = TokenTable("tokenizer", ours), TokenTable("tokenizer", theirs)
    shared = share_vocabulary(student, teacher)
    pairs = dict(zip(shared.student.tolist(), shared.teacher.tolist(), strict=True))
    assert pairs[ours.convert_tokens_to_ids("wholeword")] == theirs.convert_tokens_to_ids("wholeword")
    assert ours.convert_tokens_to_ids("<tool>") not in pairs
    assert pairs[ours.eos_token_id] == theirs.eos_token_id


def test_runs_of_blanks_that_are_added_tokens_too():
    """As Gemma's are: words of the vocabulary that stand among the added ones, spelled with ▁."""
    text = "def words(text):\n        for word in text:\n            yield word"
    ours = sentencepiece(texts=[text] * 8, start=False)
    runs = [token for token in ours.get_vocab() if len(token) > 1 and {*token} == {"▁"}]
    ours.add_tokens([AddedToken(run, normalized=False) for run in runs])
    ids = ours(text)["input_ids"]
    assert set(runs) & {*ours.convert_ids_to_tokens(ids)}
    table = TokenTable("tokenizer", ours)
    assert b"".join(map(table.__getitem__, ids)).decode() == " " + text
    [row] = aligner(ours, "bytes, of code")([ids])
    assert row.lost == ""
    assert TOKENIZERS["bytes, of code"].decode(row.ids) == text
    assert token_lengths(ours, len(ours))[ids].sum() == len(text) + 1


def test_tokenizers_that_hide_their_bytes():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ValueError, match=r"^teacher: .* WordLevel tokens, .*byte-level BPE, or BPE or Unigram"):
        TokenTable("teacher", words)
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a")))
    with pytest.raises(ValueError, match=r"^teacher: .* ## tokens"):
        TokenTable("teacher", pieces)
