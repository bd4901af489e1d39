r"""`start_layers`: a whole fresh student solved from its teacher: the teacher itself, narrower, with fewer layers.

A layer reads the residual stream x (Ht,) through a norm, and adds what it writes to it. With Q (Hs, Ht) of orthonormal
rows, the student's stream is to be x_s ≈ Q x:

    embeddings  E_s = E Qᵀ, token and position
    reads       W_s = ρ W diag(γ) Qᵀ,  b_s = b + W β      γ, β: the norm's; the student's norm has a gain of 1
    writes      W_s = Q W,  b_s = Q b

RMSNorm commutes with such a Q; LayerNorm does if Q maps constant vectors to constant vectors. ρ is the share of the
stream's length that Q keeps. Q spans the directions in which the normalized streams of all layers vary most on some
text (Ashkboos et al. 2024, arXiv:2401.15024; one Q for all layers, since residual connections stay as they are). It is
rotated so that the final norm's gains come as close as possible to a gain per coordinate. The student keeps the heads
and MLP neurons with the largest output. Its layer l is the teacher's l·Lt//Ls. From first to last, ridge regression on
what each layer writes then reduces the gap to the stream that the teacher's next such layer reads. Everything is in
closed form; a student of the teacher's own sizes becomes the teacher.

The idea is GUIDE's (arXiv:2510.06502); low-rank clones (arXiv:2505.12781) do it for all layers, but by training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdfast.closed_form import ROWS, Projection, centered_gram, random_rotation, solve_lstsq
from kdfast.ops import matmul
from kdfast.training.adapters import adapted_layer
from kdfast.training.hf import backbone, fetch, head, is_quantized, run_backbone

RIDGE = 0.1  # relative to the inputs' mean square: a few thousand tokens are not many for some hundred inputs


class Layout(NamedTuple):
    """Where a model family keeps its layers, and each layer's norms, readers and writers of attention and MLP."""

    layers: str
    final_norm: str
    norms: tuple[str, str]
    reads: tuple[tuple[str, ...], tuple[str, ...]]
    writes: tuple[str, str]
    fused: int = 1  # how many of query, key, value are in attention's one reader
    per_head: tuple[str, ...] = ()  # shared by all heads, and copied


GPT2 = Layout("h", "ln_f", ("ln_1", "ln_2"), (("attn.c_attn",), ("mlp.c_fc",)), ("attn.c_proj", "mlp.c_proj"), fused=3)
LLAMA = Layout(
    "layers",
    "norm",
    ("input_layernorm", "post_attention_layernorm"),
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    ("self_attn.o_proj", "mlp.down_proj"),
)
LAYOUTS = {"gpt2": GPT2, "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA}
LAYOUTS["qwen3"] = LLAMA._replace(per_head=("self_attn.q_norm", "self_attn.k_norm"))
# settings under which the same weights mean the same
SAME = ("hidden_act", "activation_function", "scale_attn_weights", "rope_parameters", "sliding_window")

Text = Sequence[tuple[dict[str, Any], Tensor]]  # a backbone's inputs, and (B, T) which tokens count


class Sublayer(NamedTuple):
    """Attention or the MLP of one layer."""

    norm: Any
    readers: list[Any]
    writer: Any
    heads: tuple[int, int] | None = None  # numbers of query heads and key-value heads
    fused: int = 1

    def matrices(self, device: Any = None) -> list[tuple[Tensor, Tensor | None]]:
        """Return weight (out, H) and bias of each reader: of query, key and value, or gate and up."""
        found: list[tuple[Tensor, Tensor | None]] = []
        for reader in self.readers:
            weight, bias = _read(reader, device)
            biases = [None] * self.fused if bias is None else bias.chunk(self.fused)
            found += zip(weight.chunk(self.fused), biases, strict=True)
        return found


class Decoder:
    """A model of a family in LAYOUTS, as a list of sublayers."""

    def __init__(self, model: PreTrainedModel) -> None:
        layout, inner, config = LAYOUTS[model.config.model_type], backbone(model), model.config
        self.model, self.inner, self.per_head = model, inner, layout.per_head
        self.norm = getattr(inner, layout.final_norm)
        self.layer_norm = getattr(self.norm, "bias", None) is not None  # otherwise RMSNorm
        self.layers = getattr(inner, layout.layers)
        kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
        self.sublayers: list[Sublayer] = []
        for layer in self.layers:
            for half, options in enumerate(({"heads": (config.num_attention_heads, kv), "fused": layout.fused}, {})):
                readers = [layer.get_submodule(name) for name in layout.reads[half]]
                norm, writer = (layer.get_submodule(names[half]) for names in (layout.norms, layout.writes))
                self.sublayers.append(Sublayer(norm, readers, writer, **options))  # type: ignore[arg-type]

    @property
    def sizes(self) -> dict[str, int]:
        attention, mlp = self.sublayers[:2]
        assert attention.heads is not None
        heads, kv = attention.heads
        found = {
            "hidden_size": self.model.config.hidden_size,
            "num_hidden_layers": len(self.layers),
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "num_attention_heads / num_key_value_heads": heads // kv,
            "MLP's width": _inputs(mlp.writer),
        }
        if (positions := getattr(self.inner, "wpe", None)) is not None:
            found["n_positions"] = positions.weight.shape[0]
        return found

    @property
    def head_size(self) -> int:
        attention = self.sublayers[0]
        assert attention.heads is not None
        return _inputs(attention.writer) // attention.heads[0]

    @property
    def is_tied(self) -> bool:
        return self.model.get_input_embeddings().weight is self.model.get_output_embeddings().weight

    def norm_before(self, sublayer: int) -> Any:
        """Return the norm that reads the stream before a sublayer, or the final norm after the last."""
        return self.sublayers[sublayer].norm if sublayer < len(self.sublayers) else self.norm

    def normalize(self, x: Tensor) -> Tensor:
        """Return streams after the norm, but before its gains."""
        if self.layer_norm:
            x = x - x.mean(-1, keepdim=True)
        return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def find_misfit(student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """Return why the teacher's layers cannot become the student's, with what was expected; None if they can."""
    families = [model.config.model_type for model in (student, teacher)]
    if families[0] != families[1] or families[0] not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        return f"the student's model_type is {families[0]!r} and the teacher's {families[1]!r}; expected one of {known}"
    for name in SAME:
        settings = [getattr(model.config, name, None) for model in (student, teacher)]
        if settings[0] != settings[1]:
            return f"the student's {name} is {settings[0]!r} and the teacher's {settings[1]!r}; expected the same"
    if any(getattr(model.config, "scale_attn_by_inverse_layer_idx", False) for model in (student, teacher)):
        return "scale_attn_by_inverse_layer_idx is True: a layer would be another in another place; expected False"
    if any(len(set(getattr(model.config, "layer_types", None) or ())) > 1 for model in (student, teacher)):
        return "layer_types has several kinds: a layer would be another in another place; expected one"
    if adapted_layer(teacher) is not None or any(is_quantized(p) for p in teacher.parameters()):
        return "the teacher's layers are quantized or carry an adapter; expected plain weights"
    ours, theirs = Decoder(student), Decoder(teacher)
    if ours.head_size != theirs.head_size:
        return f"the student's heads are {ours.head_size} wide and the teacher's {theirs.head_size}; expected the same"
    for name, size in ours.sizes.items():
        if size > theirs.sizes[name]:
            return f"the student's {name} is {size} and the teacher's {theirs.sizes[name]}; expected no more than that"
    if ours.is_tied and not theirs.is_tied:
        return "the student's tie_word_embeddings is True and the teacher's False; expected False"
    for mine, yours in zip(ours.sublayers[:2], theirs.sublayers[:2], strict=True):
        for a, b in zip([*mine.readers, mine.writer], [*yours.readers, yours.writer], strict=True):
            if a.bias is None and b.bias is not None:
                return "the student's layers lack biases the teacher's have; expected attention_bias, mlp_bias as there"
    return None


def has_trained_layers(student: PreTrainedModel) -> bool:
    """Return whether a gain in its layers' norms differs from the initial 1. Requires that `find_misfit` is None."""
    return any((sublayer.norm.weight != 1).any() for sublayer in Decoder(student).sublayers)


def start_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, text: Text, vocab_weights: Tensor, valid_vocab: int | None
) -> Projection:
    """Set all of the student's weights in place; return the best projector for its head.

    Args:
        student, teacher: models for which `find_misfit` returned None.
        text: several times Ht tokens.
        vocab_weights, valid_vocab: as in `closed_form.Factors`.
    """
    ours, theirs = Decoder(student), Decoder(teacher)
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        moment, outputs = _look(theirs, text)
        if not torch.isfinite(moment).all():
            raise ValueError("the teacher's hidden states hold NaN or infinity on this text; expected finite ones")
        Q = _basis(moment, ours, theirs)
        shares = _shares(theirs, Q, text)
        _set_embeddings(ours, theirs, Q, valid_vocab)
        deep, deeper = len(ours.layers), len(theirs.layers)
        for i, sublayer in enumerate(ours.sublayers):
            layer, half = divmod(i, 2)
            source = 2 * (layer * deeper // deep) + half
            _copy(sublayer, theirs.sublayers[source], Q, shares[source], outputs[source])
            for name in ours.per_head:
                shared = theirs.layers[source // 2].get_submodule(name)
                ours.layers[layer].get_submodule(name).weight.copy_(fetch(shared, "weight")[0])
            then = source + 1 if half == 0 else 2 * ((layer + 1) * deeper // deep)
            _fit_writer(sublayer, ours, theirs, theirs.norm_before(then), Q, text)
        return _set_final_norm(ours, theirs, text, vocab_weights, valid_vocab)
    finally:
        for module, training in modes:
            module.training = training


class _Stop(Exception):
    """A signal that the rest of a forward is not needed."""


def _run(text: Text, wanted: Sequence[tuple[Decoder, Any]], use: Callable[..., None]) -> None:
    """Call `use` for every batch with each wanted module's inputs (n, size), in fp32 or fp64, of the tokens that count.

    Modules of one model must be in the order in which they run.
    """
    decoders = {id(decoder): decoder for decoder, _ in wanted}
    seen: dict[int, Tensor] = {}
    last = {id(decoder): id(module) for decoder, module in wanted}

    def keep(module: Any, args: Any) -> None:
        seen[id(module)] = args[0]
        if id(module) in last.values():
            raise _Stop

    with ExitStack() as stack:
        for _, module in wanted:
            stack.callback(module.register_forward_pre_hook(keep).remove)
        for inputs, counted in text:
            for decoder in decoders.values():
                with suppress(_Stop):
                    run_backbone(decoder.model, **inputs, use_cache=False)
            found = (seen[id(module)].to(counted.device)[counted] for _, module in wanted)
            use(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in found))


def _look(theirs: Decoder, text: Text) -> tuple[Tensor, list[Tensor]]:
    """Return Σ n nᵀ of the normalized streams before all sublayers and the final norm, and each unit's output.

    Units are heads or neurons; the output is the mean square, (units,) per sublayer.
    """
    norms = [(theirs, theirs.norm_before(i)) for i in range(len(theirs.sublayers) + 1)]
    writers = [(theirs, sublayer.writer) for sublayer in theirs.sublayers]
    wanted = [one for pair in zip(norms, writers, strict=False) for one in pair] + norms[-1:]
    moment: Any = 0
    squares: list[Any] = [0] * len(writers)

    def add(*found: Tensor) -> None:
        nonlocal moment
        for x in found[::2]:
            n = theirs.normalize(x)
            moment = moment + (n.T @ n).double()
        for i, (x, sublayer) in enumerate(zip(found[1::2], theirs.sublayers, strict=True)):
            x = _units(x, sublayer)
            squares[i] = squares[i] + torch.einsum("nux,nuy->uxy", x, x).double()

    _run(text, wanted, add)
    outputs = []
    for sublayer, square in zip(theirs.sublayers, squares, strict=True):
        weight = _units(_read(sublayer.writer, square.device)[0], sublayer)  # (H, units, size)
        outputs.append(torch.einsum("hux,uxy,huy->u", weight, square, weight))
    return moment, outputs


def _shares(theirs: Decoder, Q: Tensor, text: Text) -> list[float]:
    """Return ρ for every sublayer: Q maps a normalized stream to ρ times a normalized stream."""
    sums: Any = 0

    def add(*streams: Tensor) -> None:
        nonlocal sums
        kept = [(theirs.normalize(x) @ Q.T.to(x)).square().sum().double() for x in streams]
        sums = sums + torch.stack([*kept, kept[0].new_tensor(len(streams[0]) * len(Q))])

    _run(text, [(theirs, sublayer.norm) for sublayer in theirs.sublayers], add)
    return (sums[:-1] / sums[-1]).sqrt().tolist()


def _units(x: Tensor, sublayer: Sublayer) -> Tensor:
    """Return `x` (*, inner) as (*, heads, head size), or (*, neurons, 1)."""
    return x.unflatten(-1, (sublayer.heads[0] if sublayer.heads else x.shape[-1], -1))


def _basis(moment: Tensor, ours: Decoder, theirs: Decoder) -> Tensor:
    """Return Q (Hs, Ht), float64."""
    width, whole = ours.model.config.hidden_size, len(moment)
    eye = torch.eye(whole).to(moment)
    if width == whole:
        return eye
    one = eye.new_full((whole, 1), whole**-0.5)
    if theirs.layer_norm:  # the constant direction gets its own coordinate, and is last among the others
        left = eye - one @ one.T
        moment = left @ moment @ left - one @ one.T * moment.trace()
    rank = width - theirs.layer_norm
    leading = torch.linalg.eigh(moment).eigenvectors[:, whole - rank :]
    leading = leading @ random_rotation(rank, leading)  # for the case that all gains are equal
    gains = fetch(theirs.norm, "weight")[0].detach().to(leading)
    leading = leading @ torch.linalg.eigh(leading.T * gains @ leading).eigenvectors
    if not theirs.layer_norm:
        return leading.T.contiguous()
    own = eye.new_full((width, 1), width**-0.5)
    v = own - torch.eye(width).to(own)[:, -1:]  # the reflection that maps the last unit vector to the constant one
    reflection = torch.eye(width).to(own) - v @ v.T * (2 / v.square().sum())
    return reflection[:, :-1] @ leading.T + own @ one.T


def _set_embeddings(ours: Decoder, theirs: Decoder, Q: Tensor, valid_vocab: int | None) -> None:
    """Set embedding and head (an untied one includes the final norm's gains), and GPT-2's positions."""
    gains = fetch(theirs.norm, "weight")[0].detach().to(Q)
    ends = [("get_input_embeddings", Q), ("get_output_embeddings", Q * gains)]
    for name, into in ends[: 1 if ours.is_tied else 2]:
        weight, source = getattr(ours.model, name)().weight, fetch(getattr(theirs.model, name)(), "weight")[0]
        rows = min(len(weight), len(source), valid_vocab or len(weight))
        for ids in matmul.blocks(rows, ROWS):
            weight[ids] = (source[ids].to(Q) @ into.T).to(weight)
    if (positions := getattr(ours.inner, "wpe", None)) is not None:
        source = fetch(theirs.inner.wpe, "weight")[0]
        positions.weight.copy_(source[: len(positions.weight)].to(Q) @ Q.T)


def _copy(ours: Sublayer, theirs: Sublayer, Q: Tensor, share: float, outputs: Tensor) -> None:
    """Copy a sublayer, with its norm folded into the readers, keeping the units with the largest `outputs`."""
    gains, shift = _read(theirs.norm, Q.device)
    inner = _inputs(ours.writer)
    if theirs.heads is None or ours.heads is None:
        units = outputs.topk(inner).indices.sort().values
        rows = [units] * len(ours.matrices())
    else:
        units, keys = (_rows(x, inner // ours.heads[0]) for x in _choose_heads(outputs, theirs.heads, ours.heads))
        rows = [units, keys, keys]
    found = []
    for (weight, bias), some in zip(theirs.matrices(Q.device), rows, strict=True):
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        bias = bias if shift is None else bias + weight @ shift
        found.append(((weight * gains)[some] @ Q.T * share, bias[some]))
    for i, reader in enumerate(ours.readers):
        weights, biases = zip(*found[i * ours.fused : (i + 1) * ours.fused], strict=True)
        _write(reader, torch.cat(weights), torch.cat(biases))
    ours.norm.weight.fill_(1.0)
    if shift is not None:
        ours.norm.bias.zero_()
    weight, bias = _read(theirs.writer, Q.device)
    _write(ours.writer, Q @ weight[:, units], None if bias is None else Q @ bias)


def _choose_heads(outputs: Tensor, theirs: tuple[int, int], ours: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the heads and key-value heads with the largest outputs (heads,), keeping those of one key together."""
    groups = outputs.unflatten(0, (theirs[1], -1))
    best = groups.topk(ours[0] // ours[1], dim=1)
    keys = best.values.sum(1).topk(ours[1]).indices.sort().values
    return (keys[:, None] * groups.shape[1] + best.indices[keys].sort(1).values).flatten(), keys


def _rows(heads: Tensor, size: int) -> Tensor:
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()


def _fit_writer(ours: Sublayer, student: Decoder, teacher: Decoder, target: Any, Q: Tensor, text: Text) -> None:
    """Add to the writer the ridge solution for the gap between the student's stream and the one `target` reads."""
    weight, bias = _read(ours.writer)
    gram: Any = 0
    cross: Any = 0

    def add(stream: Tensor, a: Tensor, theirs: Tensor) -> None:
        nonlocal gram, cross
        lacks = theirs @ Q.T.to(theirs) - stream - a @ weight.T.to(a)
        if bias is not None:
            lacks, a = lacks - bias.to(lacks), torch.cat([a, a.new_ones(len(a), 1)], 1)
        gram, cross = gram + (a.T @ a).double(), cross + (a.T @ lacks).double()

    _run(text, [(student, ours.norm), (student, ours.writer), (teacher, target)], add)
    diagonal = gram.diagonal()[: weight.shape[1]]
    diagonal += RIDGE * diagonal.mean()
    change = torch.linalg.solve(gram, cross).T
    _write(ours.writer, weight + change[:, : weight.shape[1]], None if bias is None else bias + change[:, -1])


def _set_final_norm(
    ours: Decoder, theirs: Decoder, text: Text, vocab_weights: Tensor, valid_vocab: int | None
) -> Projection:
    """Solve the final norm's gain and shift for the teacher's logits; return the projector P of the student's head.

    With h* = P h and G = Eᵀ D E, min E[(γ∘n + β − h*)ᵀ G (γ∘n + β − h*)]: (G ∘ Cov n) γ = diag(G Cov(h*, n)).
    """
    nothing = torch.empty(0, device=vocab_weights.device)
    own, true = head(ours.model, nothing), head(theirs.model, nothing)
    solved = solve_lstsq(own, true, vocab_weights=vocab_weights, valid_vocab=valid_vocab)
    gram = centered_gram(own, vocab_weights[:valid_vocab])
    gains, shift = fetch(theirs.norm, "weight", "bias")
    width = len(gram)
    sums: Any = 0

    def add(stream: Tensor, teacher_stream: Tensor) -> None:
        nonlocal sums
        h = theirs.normalize(teacher_stream) * gains.to(teacher_stream)
        h = (h if shift is None else h + shift.to(h)) @ solved.weight.T.to(h)
        both = torch.cat([ours.normalize(stream), h, h.new_ones(len(h), 1)], 1)
        sums = sums + (both.T @ both).double()

    _run(text, [(ours, ours.norm), (theirs, theirs.norm)], add)
    moments = sums / sums[-1, -1]
    mean = moments[-1]
    if ours.layer_norm:  # the shift takes the constant part
        moments = moments - torch.outer(mean, mean)
    normal = gram * moments[:width, :width]
    normal.diagonal().add_(1e-6 * normal.diagonal().mean())
    gain = torch.linalg.solve(normal, (gram @ moments[width:-1, :width]).diagonal())
    ours.norm.weight.copy_(gain)
    if ours.layer_norm:
        ours.norm.bias.copy_(mean[width:-1] - gain * mean[:width])
    return solved


def _read(layer: Any, device: Any = None) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weight, (out, in) or a norm's (H,), and its bias, in float64."""
    weight, bias = fetch(layer, "weight", "bias")
    weight = weight.detach().to(device, torch.float64)
    bias = None if bias is None else bias.detach().to(device, torch.float64)
    return weight.T if isinstance(layer, Conv1D) else weight, bias


def _inputs(linear: Any) -> int:
    return linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]


def _write(linear: Any, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight.T if isinstance(linear, Conv1D) else weight)
    if linear.bias is not None:
        linear.bias.zero_() if bias is None else linear.bias.copy_(bias)
