"""A small model's log-probabilities as vLLM and SGLang print them, and an HTTP server that answers with them."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from tiny_models import tiny

from kdfast import Head, SparseLogits, fused_kd_loss
from kdfast.training import CachedEntries

V = 257  # of byte_tokenizer


def log_probs(model, ids):
    """(T, V) float64: row t is the distribution after token t."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def _entries(row, k, actual=None):
    """The k most likely ids with their log-probabilities, in fp32, and the token itself."""
    values, ids = row.float().topk(k)
    found = dict(zip(ids.tolist(), values.tolist(), strict=True))
    if actual is not None:
        found.setdefault(actual, row[actual].float().item())
    return found


def vllm(model, tokenizer, ids, k):
    """`prompt_logprobs`, as JSON has it: ids are text."""
    rows = log_probs(model, ids)
    printed = [None]
    for t in range(1, len(ids)):
        entries = _entries(rows[t - 1], k, ids[t])
        printed.append({
            str(i): {"logprob": p, "rank": rank, "decoded_token": tokenizer.decode([i])}
            for rank, (i, p) in enumerate(entries.items(), 1)
        })  # fmt: skip
    return printed


def sglang(model, tokenizer, ids, k, texts=False):
    """`meta_info`: the k most likely alone, and the tokens themselves apart."""
    rows = log_probs(model, ids)

    def one(p, i):
        return [p, i, tokenizer.decode([i]) if texts else None]

    top = [[one(p, i) for i, p in _entries(row, k).items()] for row in rows]
    own = [one(rows[t - 1][i].float().item() if t else None, i) for t, i in enumerate(ids)]
    best = int(rows[-1].argmax())
    return {
        "input_top_logprobs": [None, *top[:-1]],
        "input_token_logprobs": own,
        "output_top_logprobs": [top[-1]],
        "output_token_logprobs": [one(rows[-1][best].float().item(), best)],
    }


class LogProbServer:
    """Answers at `url`; `behave(number of the request, its body)` may return what is answered in place of the truth.

    That is ("cut", bytes), ("late",) until `end` is set, ("twice",), ("status", code, headers, body), ("json", object),
    or ("change", function of the true answer); None is the truth. `requests`: what came, as (path, headers, body).
    """

    def __init__(self, model, tokenizer, kind, most=64):
        self.model, self.tokenizer, self.kind, self.most = model, tokenizer, kind, most
        self.requests, self.behave, self.context = [], lambda number, body: None, 4096
        self.lock, self.end = threading.Lock(), threading.Event()

    def models(self):
        return {"object": "list", "data": [{"id": "served", "object": "model", "max_model_len": self.context}]}

    def answer(self, body):
        """(status, JSON)"""
        if self.kind == "sglang":
            k, texts = body["top_logprobs_num"], body["return_text_in_logprobs"]
            given = body["input_ids"]
            return 200, [
                {"text": "", "meta_info": {"id": "x", **sglang(self.model, self.tokenizer, ids, k, texts)}}
                for ids in given
            ]
        k = body["prompt_logprobs"]
        if k > self.most:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        choices = [
            {"index": i, "text": "", "logprobs": None, "finish_reason": "length",
             "prompt_logprobs": vllm(self.model, self.tokenizer, ids, k)}
            for i, ids in enumerate(body["prompt"])
        ]  # fmt: skip
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    def prompts(self):
        """Every prompt that was asked for."""
        name = "prompt" if self.kind == "vllm" else "input_ids"
        return [ids for _, _, body in self.requests if body for ids in body[name]]

    def handle(self, handler, body):
        path = handler.path
        with self.lock:
            self.requests.append((path, dict(handler.headers), body))
            asked = sum(given is not None for _, _, given in self.requests)
        told = self.behave(asked, body) if body is not None else None
        what, *rest = told or ("truth",)
        if what == "status":
            code, headers, content = rest
            return self.send(handler, code, content.encode(), headers)
        if what == "late":
            self.end.wait(60)
        with self.lock:  # one model, one thread
            status, answer = (200, self.models()) if body is None else self.answer(body)
        if what == "json":
            answer = rest[0]
        if what == "change":
            answer = rest[0](answer)
        content = json.dumps(answer).encode()
        self.send(handler, status, content, cut=rest[0] if what == "cut" else None)
        if what == "twice":
            handler.wfile.write(content)

    def send(self, handler, code, content, headers=(), cut=None):
        handler.send_response(code)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content if cut is None else content[:cut])

    @contextmanager
    def running(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.handle(self, None)

            def do_POST(self):
                server.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args):
                pass

            def handle(self):
                with suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
                    super().handle()

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield self
        finally:
            http.shutdown()
            http.server_close()
            thread.join()


def loss_and_gradient(rows, teacher_of, tau=1.0):
    """Of a student at these rows, against the teacher that `teacher_of(batch)` gives."""
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    student = tiny("gpt2", V=V, width=16, seed=2, spread=0.4)
    hidden = student.transformer(batch["input_ids"]).last_hidden_state
    targets = batch["labels"].roll(-1, dims=1)
    targets[:, -1] = -100
    weight = student.lm_head.weight
    loss = fused_kd_loss(
        Head(hidden, weight), teacher_of(batch), targets, temperature=tau, kd_weight=1.0, ce_weight=0.0
    )
    loss.backward()
    return loss.detach(), student.get_input_embeddings().weight.grad


def cached(batch):
    return CachedEntries(batch["teacher_indices"], batch["teacher_log_probs"], batch["teacher_log_tails"]).at(1.0)


def dense(teacher):
    return lambda batch: Head(
        teacher.transformer(batch["input_ids"]).last_hidden_state.detach(), teacher.lm_head.weight.detach()
    )


def exact(teacher, k, own):
    """The k most likely ids, the token itself where `own`, and the tail from all of the vocabulary."""

    def make(batch):
        with torch.no_grad():
            p = teacher(input_ids=batch["input_ids"]).logits.double().log_softmax(-1)
        inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(k).indices, True)
        if own:
            inside[:, :-1].scatter_(-1, batch["input_ids"][:, 1:, None], True)
        values, indices = p.masked_fill(~inside, -torch.inf).topk(k + 1)
        return SparseLogits(indices, values, log_tail=p.masked_fill(inside, -torch.inf).logsumexp(-1), tail="bucket")

    return make
