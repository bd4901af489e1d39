"""Log-probabilities as other tools print them, and their conversion to a teacher cache's entries.

A row, from a data set or JSON lines, has one of these layouts; [ ] is per token, { } per id:

vllm      prompt_logprobs  [null, {"<id>": {"logprob": …, "rank": …, "decoded_token": …}}, …], in a response's choices
          or not. k entries, and the token itself if it is not among them. logprobs: the same for generated text
          (token_ids)
sglang    input_top_logprobs  [null, [[logprob, id, text or null], …], …], in meta_info or not, beside
          input_token_logprobs  [[null, id, text], …], of the tokens themselves; output_… for generated text
axolotl   logprobs  [[{"logprob": …, "token": "token_id:<id>"}, …], …], or only numbers beside target_token_ids, for the
          last tokens; target_logprobs beside target_token_ids, as axolotl prepares them: renormalized

Position t has the distribution that *predicts* token t, which is a cache's row t − 1. For target_logprobs axolotl's
versions differ in this, and the tokens reveal which. Sources: vLLM's v1/engine/logprobs.py and entrypoints/openai,
SGLang's srt/managers/tokenizer_manager.py, axolotl's integrations/kd/chat_template.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kdfast.training.cache.description import CacheError
from kdfast.training.cache.entries import TopK
from kdfast.training.data.tokenizers import count_ids

IMPOSSIBLE = -9999.0  # vLLM's −inf; axolotl's padding is lower
ROUNDING = 1e-4  # a log-probability above 0, or mass in duplicates or beyond the vocabulary, may be rounding up to this
AGREE = 1e-2  # how much two log-probabilities of one token in one place may differ
SUM = 1e-3  # the same for the sum of probabilities, since some print four digits
UNSEEN = -12.0  # the assumed log-probability of a token that is not among the entries, and the lowest of any
WRONG_TEXTS = 100  # one decoded token in so many may be spelled differently
WORDS = ("text", "prompt", "completion")  # columns that may look like JSON
LAYOUTS = ("prompt_logprobs", "input_top_logprobs", "target_logprobs", "logprobs")


class Position(NamedTuple):
    """Entries of the distribution that predicts one token."""

    ids: list[int]
    log_probs: Sequence[Any]
    texts: Sequence[Any] = ()


class Listed(NamedTuple):
    """A row's positions, one per token from the first, whose position is None."""

    layout: str  # a key of LAYOUTS
    positions: list[Position | None]
    tokens: list[list[int]]  # candidates for the row's tokens; the first that fits
    known: bool  # whether each token is among its own entries
    whole: bool  # whether nothing is left out, from the second token on
    aligned_right: bool  # whether positions belong to the last tokens


def rows_in(row: Any, where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows in `row`: itself, or the choices of a server's response. Raise CacheError if it is neither."""
    if isinstance(row, str):
        if not row.strip():
            return
        try:
            row = json.loads(row)
        except ValueError as error:
            raise CacheError(f"{where} is no JSON ({error}): truncated, or another kind of file") from error
    if not isinstance(row, Mapping):
        raise CacheError(f"{where} holds {type(row).__name__}; expected an object with names, such as prompt_logprobs")
    choices = row.get("choices")
    for one in choices if isinstance(choices, list) else [row]:
        meta = one.get("meta_info")
        yield {**one, **(meta if isinstance(meta, Mapping) else {})}


def read_row(
    row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, field: str | None = None
) -> Listed:
    """Return the positions and tokens that a row lists.

    field: the name of a column that is not in LAYOUTS, with lists as in `logprobs` or `prompt_logprobs`.
    Raises CacheError naming `where`, for a row without a known layout or without tokens.
    """
    row = {name: x for name, x in row.items() if x is not None}
    if field is not None:
        if field not in row:
            raise CacheError(f"{where} has no {field!r}; it has {', '.join(row)}. Set logprobs_field")
        row = {name: x for name, x in row.items() if name not in LAYOUTS}
        given = _parsed(row.pop(field))
        row["prompt_logprobs" if _is_by_id(given) else "logprobs"] = given
    row = {name: x if name in WORDS else _parsed(x) for name, x in row.items()}
    layout = next((name for name in LAYOUTS if isinstance(row.get(name), list)), None)
    if layout is None:
        raise CacheError(
            f"{where} has {', '.join(row) or 'nothing'}; expected one of {', '.join(LAYOUTS)}, or logprobs_field, the "
            "name that it has here"
        )
    try:
        return _READERS[layout](row, tokenizer)
    except CacheError as error:
        raise CacheError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CacheError(f"{where}: {layout} is not as expected ({type(error).__name__}: {error})") from error


def _parsed(value: Any) -> Any:
    """Return the list in a column that keeps it as JSON; anything else as it is."""
    with suppress(ValueError):
        return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
    return value


def _is_by_id(given: Any) -> bool:
    some = next((x for x in given if x is not None), None) if isinstance(given, list) else None
    return isinstance(some, Mapping)


def _vllm(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Listed:
    positions = [_by_id(x) for x in row["prompt_logprobs"]]
    generated = row.get("logprobs")
    if row.get("token_ids") and generated and _is_by_id(generated):
        positions += [_by_id(x) for x in generated]
        row = {**row, "prompt_token_ids": _ids(row["prompt_token_ids"]) + _ids(row["token_ids"])}
    return Listed("prompt_logprobs", positions, _tokens(row, tokenizer), True, True, False)


def _by_id(entries: Any) -> Position | None:
    if entries is None:
        return None
    known = [(int(i), x) for i, x in entries.items() if x is not None]  # Arrow gives every row all ids of a column
    ids, values = [i for i, _ in known], [x if isinstance(x, dict) else {"logprob": x} for _, x in known]
    return Position(ids, [x["logprob"] for x in values], [x.get("decoded_token") for x in values])


def _sglang(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Listed:
    top = [*row["input_top_logprobs"], *(row.get("output_top_logprobs") or ())]
    own = [*(row.get("input_token_logprobs") or ()), *(row.get("output_token_logprobs") or ())]
    if own and len(own) != len(top):
        raise CacheError(f"input_top_logprobs has {len(top)} tokens and input_token_logprobs {len(own)}")
    positions: list[Position | None] = []
    for t, entries in enumerate(top):
        if entries is None:
            positions.append(None)
            continue
        log_probs, ids, *texts = (list(part) for part in zip(*entries, strict=True))
        ids = _ids(ids)
        if own and int(own[t][1]) in ids:
            if abs(float(log_probs[ids.index(int(own[t][1]))]) - float(own[t][0])) > AGREE:
                raise CacheError(f"input_top_logprobs and input_token_logprobs are of other positions at token {t}")
        elif own:
            log_probs, ids = [own[t][0], *log_probs], [int(own[t][1]), *ids]
            texts = [[None, *texts[0]]] if texts else []
        positions.append(Position(ids, log_probs, *texts[:1]))
    tokens = [[int(x[1]) for x in own]] if own else _tokens(row, tokenizer)
    if own and "input_ids" in row and (given := _ids(row["input_ids"])) != tokens[0][: len(given)]:
        raise CacheError("input_ids are other tokens than those of input_token_logprobs")
    return Listed("input_top_logprobs", positions, tokens, bool(own), True, False)


def _prepared(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Listed:
    masks = row.get("target_mask") or [None] * len(row["target_logprobs"])
    positions = [_masked(*each) for each in zip(row["target_logprobs"], row["target_token_ids"], masks, strict=True)]
    return Listed("target_logprobs", positions, _tokens(row, tokenizer), False, False, False)


def _masked(log_probs: Sequence[Any], ids: Sequence[Any], mask: Sequence[Any] | None) -> Position | None:
    """Return the entries that are not padding; None if all are."""
    kept = [
        (int(i), x) for i, x, m in zip(ids, log_probs, [1] * len(ids) if mask is None else mask, strict=True)
        if m and float(x) > IMPOSSIBLE
    ]  # fmt: skip
    return Position(*map(list, zip(*kept, strict=True))) if kept else None


def _last_tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Listed:
    given = row["logprobs"]
    if _is_by_id(given):  # vLLM's for generated text, without the prompt's
        positions = [_by_id(x) for x in given]
        if row.get("token_ids"):
            row = {**row, "prompt_token_ids": _ids(row["prompt_token_ids"]) + _ids(row["token_ids"])}
        return Listed("logprobs", positions, _tokens(row, tokenizer), True, False, True)
    if "target_token_ids" in row:
        pairs = zip(given, row["target_token_ids"], strict=True)
        positions = [Position(_ids(i), x) if x else None for x, i in pairs]
    else:
        positions = [
            Position([int(str(one["token"]).removeprefix("token_id:")) for one in x], [one["logprob"] for one in x])
            if x else None
            for x in given
        ]  # fmt: skip
    return Listed("logprobs", positions, _tokens(row, tokenizer), False, False, True)


_READERS = {
    "prompt_logprobs": _vllm,
    "input_top_logprobs": _sglang,
    "target_logprobs": _prepared,
    "logprobs": _last_tokens,
}


def _ids(given: Iterable[Any]) -> list[int]:
    return [int(i) for i in given]


def _tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return candidates for a row's tokens: those it lists, or those of its text with and without special tokens."""
    for name in ("input_ids", "prompt_token_ids"):
        if name in row:
            return [_ids(row[name])]
    if isinstance(messages := row.get("messages"), list):
        return [_ids(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))]
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str):
        raise CacheError("it has no tokens: expected input_ids, prompt_token_ids, messages or text beside its entries")
    return [tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False)]


def fit(listed: Listed, where: str, *, ahead: bool = False) -> tuple[list[int], list[Position | None]]:
    """Return a row's tokens and the entries that predict each: None for the first, and if there are none.

    ahead: position t predicts token t + 1.
    Raises CacheError naming `where` and what does not fit: length, nulls, or a token that must be among its entries.
    """
    problems = []
    for tokens in listed.tokens:
        positions = listed.positions
        if listed.aligned_right and len(positions) < len(tokens):
            positions = [*[None] * (len(tokens) - len(positions)), *positions]
        if ahead:
            positions = [None, *positions[:-1]]
        problem = _misfit(listed, tokens, positions)
        if problem is None:
            return tokens, [None, *positions[1:]]
        problems.append(problem)
    raise CacheError(f"{where}: {problems[0]}")


def _misfit(listed: Listed, tokens: list[int], positions: list[Position | None]) -> str | None:
    if len(positions) != len(tokens):
        return f"{listed.layout} has {len(positions)} positions for {len(tokens)} tokens; expected one for each"
    if listed.whole and (lost := next((t for t in range(1, len(tokens)) if not positions[t]), None)) is not None:
        return f"{listed.layout} is null at token {lost}; expected entries from the second token on"
    if not listed.known:
        return None
    for t in range(1, len(tokens)):
        here = positions[t]
        if here is not None and tokens[t] not in here.ids:
            if leads(tokens, positions).sum() > 0:
                return (
                    f"{listed.layout} is shifted: its entries at token t are of token t + 1; expected those that "
                    "predict token t, the first one null, as the server prints them"
                )
            return f"token {t} is {tokens[t]}, and not among the ids there: entries of another text, or tokenizer"
    return None


def leads(tokens: Sequence[int], positions: Sequence[Position | None]) -> np.ndarray:
    """Return how much likelier each position makes the next token than its own: > 0 if entries are one early."""
    found = []
    for here, own, following in zip(positions, tokens, tokens[1:], strict=False):
        if here is not None:
            known = dict(zip(here.ids, map(float, here.log_probs), strict=False))
            one, other = (max(known.get(i, UNSEEN), UNSEEN) for i in (following, own))
            found.append(one - other)
    return np.array(found)


def check_texts(listed: Listed, where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise CacheError if decoded tokens differ from the tokenizer's, so that the teacher has another tokenizer."""
    skipped, wrong, checked = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}, {}, set()
    for position in filter(None, listed.positions):
        for i, text in zip(position.ids, position.texts, strict=False):
            if i in checked or i in skipped or not text or "\ufffd" in text or i >= count_ids(tokenizer):
                continue
            checked.add(i)
            ours = str(tokenizer.decode([i]))
            if "\ufffd" not in ours and text.strip() not in (ours.strip(), tokenizer.convert_ids_to_tokens(i)):
                wrong[i] = f"{i} is {text!r} there and {ours!r} here"
    if len(wrong) > len(checked) / WRONG_TEXTS:
        raise CacheError(
            f"{where}: {len(wrong)} of {len(checked)} ids are other words than in the tokenizer "
            f"{str(tokenizer.name_or_path)!r}: {', '.join(list(wrong.values())[:3])}. "
            "Expected a teacher that reads the student's ids; tokenizer_name names their tokenizer"
        )


def to_top_k(
    positions: Iterable[Position | None],
    where: str,
    vocab: int,
    k: int,
    *,
    renormalized: int = 0,
    temperature: float = 1.0,
) -> TopK:
    """Return a cache's entries at τ = 1, (T, k) each: the most likely ids, and the log of the remaining mass.

    The tail is 1 − Σ p, at least what fp32 rounding can produce, and −inf if all ids are given. A row without entries
    is all tail and teaches nothing. Entries of ids ≥ `vocab` go to the tail if they are negligible.

    renormalized: if above 0, the entries are known to sum to 1 at `temperature` over their own ids, and nothing is
        known about the others: there is no tail at any of this many temperatures.

    Raises CacheError naming `where`, the token, and the value that is not a log-probability.
    """
    rows = list(positions)
    counts = [0 if row is None else len(row.ids) for row in rows]
    given = [row for row in rows if row is not None]
    try:
        if any(len(row.ids) != len(row.log_probs) for row in given):
            raise ValueError("ids and log-probabilities are not equally many")
        ids = np.fromiter(chain.from_iterable(row.ids for row in given), np.int64)
        log_probs = np.fromiter(map(float, chain.from_iterable(row.log_probs for row in given)), np.float64)
    except (TypeError, ValueError) as error:
        raise CacheError(f"{where}: an entry is no number ({error})") from error
    at = np.repeat(np.arange(len(rows)), counts)

    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            n = int(wrong.argmax())
            raise CacheError(f"{where}, before token {at[n] + 1}: id {ids[n]} has {log_probs[n]:g}, {what}")

    refuse(np.isnan(log_probs), "which is no number")
    refuse(log_probs > ROUNDING, "which is no log-probability; logits, or probabilities, are not taken")
    refuse(ids < 0, "and no tokenizer has such an id")
    kept = log_probs > IMPOSSIBLE
    ids, log_probs, at = ids[kept], log_probs[kept].clip(max=0), at[kept]
    order = np.lexsort((-log_probs, ids, at))
    ids, log_probs, at = ids[order], log_probs[order], at[order]
    again = np.zeros(len(ids), bool)
    again[1:] = (ids[1:] == ids[:-1]) & (at[1:] == at[:-1])
    refuse(again & (np.diff(log_probs, prepend=0) < -ROUNDING), "and another log-probability there")
    outside = ids >= vocab
    lost = np.bincount(at[outside], np.exp(log_probs[outside]), minlength=len(rows))
    refuse(outside & (lost[at] > ROUNDING), f"and the tokenizer {vocab} ids: another vocabulary")
    kept = ~again & ~outside
    ids, log_probs, at = ids[kept], log_probs[kept], at[kept]
    order = np.lexsort((-log_probs, at))
    ids, log_probs, at = ids[order], log_probs[order], at[order]
    counted = np.bincount(at, minlength=len(rows))
    rank = np.arange(len(at)) - np.repeat(np.cumsum(counted) - counted, counted)
    sums = np.bincount(at, np.exp(log_probs), minlength=len(rows))
    if (sums > 1 + SUM).any():
        t = int(sums.argmax())
        raise CacheError(f"{where}, before token {t + 1}: probabilities sum to {sums[t]:.6g}; expected 1 at most")
    kept = rank < k
    ids, log_probs, at, rank = ids[kept], log_probs[kept], at[kept], rank[kept]
    p = np.exp(log_probs)
    left = 1 - np.bincount(at, p, minlength=len(rows))
    rounded = np.bincount(at, np.abs(p * log_probs), minlength=len(rows)) * np.finfo(np.float32).eps
    whole = np.minimum(counted, k) == vocab
    if renormalized:
        if (away := (np.abs(sums - 1) > SUM) & (counted > 0)).any():
            t = int(away.argmax())
            raise CacheError(f"{where}, before token {t + 1}: probabilities sum to {sums[t]:.6g}, and elsewhere to 1")
        whole, log_probs = counted > 0, log_probs * temperature
    with np.errstate(divide="ignore"):
        tails = np.log(np.where(whole, 0.0, np.maximum(left, rounded).clip(max=1)))
    indices, values = np.zeros((len(rows), k), np.int64), np.full((len(rows), k), -np.inf)
    indices[at, rank], values[at, rank] = ids, log_probs
    columns = np.repeat(tails[:, None], max(renormalized, 1), axis=1)
    return TopK(torch.from_numpy(indices), torch.from_numpy(values), torch.from_numpy(columns))
