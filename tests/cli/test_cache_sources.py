"""`kdfast cache` from a server and from a file, and `kdfast distill` from what it wrote: as from the live teacher."""

import json

import pytest
import yaml
from byte_tokenizer import make_tokenizer
from logprob_server import LogProbServer, vllm
from transformers import AutoModelForCausalLM

from kdfast.training.cache import servers

TOKENIZER = make_tokenizer()
KEPT = {"teacher_cache": "kept", "cache_dtype": "float32", "cache_shard_tokens": 200, "temperature": 1.0}
KEPT |= {"tokenizer_name": "teacher", "recipe": "auto"}
LIVE = ["--recipe", "teacher_head", "--temperature", "1", "--output_dir", "live"]
KEY = "sk-a-secret-of-the-user"


@pytest.fixture
def configured(place, monkeypatch):
    """The current directory; c.yaml names no teacher and asks for entries at τ = 1."""
    for name in servers.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    config = yaml.safe_load((place / "config.yaml").read_text())
    del config["teacher_model_name_or_path"]
    (place / "c.yaml").write_text(yaml.safe_dump(config | KEPT))
    return place


@pytest.fixture
def model(teacher):
    return AutoModelForCausalLM.from_pretrained(teacher).eval()


@pytest.fixture(params=["vllm", "sglang"])
def server(request, model):
    with LogProbServer(model, TOKENIZER, request.param, most=257).running() as running:
        yield running


def losses(place, out):
    log = json.loads((place / out / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log for key in ("loss", "eval_loss", "eval_kl_teacher_student") if key in entry]


def test_from_a_server_as_from_the_live_teacher(configured, kdfast, server, monkeypatch):
    monkeypatch.setenv("KDFAST_SERVER_API_KEY", KEY)
    asked = ["--server", server.url, "--server_kind", server.kind, "--cache_top_k", "257"]
    code, out, err = kdfast("cache", "c.yaml", *asked)
    assert code == 0, err
    assert f"kept: {server.url}: {server.kind} serves 'served'" in out
    assert KEY not in out + err
    count = len(server.requests)
    code, out, err = kdfast("cache", "c.yaml", *asked)
    assert (code, "kept: complete already" in out) == (0, True), err
    assert len(server.prompts()) == len({tuple(ids) for ids in server.prompts()})
    assert len(server.requests) == count + 1  # of which model
    code, out, err = kdfast("distill", "c.yaml")
    assert (code, "recipe cached" in out) == (0, True), err
    assert kdfast("distill", "config.yaml", *LIVE)[0] == 0
    assert losses(configured, "out") == pytest.approx(losses(configured, "live"), rel=1e-5)
    solved = ["--recipe", "svd_init", "--teacher_model_name_or_path", "teacher", "--output_dir", "solved"]
    code, out, err = kdfast("distill", "c.yaml", *solved)  # whose start needs the teacher itself
    assert (code, "kept: the teacher's entries are there" in out) == (0, True), err
    written = [path for folder in ("kept", "out") for path in (configured / folder).rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in written)


def test_from_a_file_as_from_the_live_teacher(configured, kdfast, model):
    """The file has the run's own blocks, as somebody who asked a server for them would have kept the answers."""
    text = (configured / "text.txt").read_text()
    ids = [*TOKENIZER(text)["input_ids"], 256]
    blocks = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    rows = [{"prompt_token_ids": block, "prompt_logprobs": vllm(model, TOKENIZER, block, 257)} for block in blocks]
    (configured / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((configured / "c.yaml").read_text())  # whose server is not asked
    (configured / "c.yaml").write_text(yaml.safe_dump({**config, "teacher_model_server_url": "http://127.0.0.1:9"}))
    code, _, err = kdfast("cache", "import", "given.jsonl")
    assert (code, "expected kdfast cache import FILE CONFIG.yaml" in err) == (2, True), err
    code, out, err = kdfast("cache", "import", "given.jsonl", "c.yaml")
    assert (code, "kept: given.jsonl: prompt_logprobs, at most 257 entries a token" in out) == (0, True), err
    code, out, err = kdfast("distill", "c.yaml")
    assert (code, "recipe cached" in out) == (0, True), err
    assert kdfast("distill", "config.yaml", *LIVE)[0] == 0
    assert losses(configured, "out") == pytest.approx(losses(configured, "live"), rel=1e-5)
    out, live = (json.loads((configured / run / "summary.json").read_text()) for run in ("out", "live"))
    assert (out["kl_is_lower_bound"], live["kl_is_lower_bound"]) == (True, False)
    code, _, err = kdfast("distill", "c.yaml", "--temperature", "2", "--output_dir", "warm")
    assert (code, "'kept' was made for 1. Train with one of those, or say what its entries leave" in err) == (2, True)
    tail = ["--temperature", "2", "--teacher_tail", "renormalize_both"]
    code, _, err = kdfast("distill", "c.yaml", *tail, "--output_dir", "warm")
    assert code == 0, err
    (configured / "given.jsonl").write_text(json.dumps(rows[0]) + "\n")
    code, _, err = kdfast("cache", "import", "given.jsonl", "c.yaml", "--teacher_cache", "other")
    assert (code, "given.jsonl has no entries for" in err, err.count("kdfast: ")) == (2, True, 1)


def test_what_is_refused(configured, kdfast, server):
    here = ["--server", server.url, "--server_kind", server.kind]
    refused = {
        "temperature=2, and of the ids that a server leaves out": [*here, "--temperature", "2"],
        "server_kind='tgi'; expected 'vllm' or 'sglang'": ["--server", server.url, "--server_kind", "tgi"],
        "both of teacher_model_server_url and teacher_logprobs given": [*here, "--teacher_logprobs", "f.jsonl"],
        "teacher_model_server_url='localhost'; expected http://host:port": ["--server", "localhost"],
        "cache_method='sample' and": [*here, "--cache_method", "sample"],
        "cache_top_k=300; expected 1 to 257": [*here, "--cache_top_k", "300"],
        "server_token_limit=100; expected at least": [*here, "--server_token_limit", "100"],
        "teacher_model_name_or_path is missing; kdfast cache needs it": [],
        "'f.jsonl' cannot be read": ["--teacher_logprobs", "f.jsonl"],
    }
    for message, overrides in refused.items():
        code, _, err = kdfast("cache", "c.yaml", *overrides)
        assert (code, message in err, err.count("kdfast: ")) == (2, True, 1), err
    server.behave = lambda number, body: ("status", 503, {"Retry-After": "0"}, "overloaded")
    nothing = [*here, "--teacher_cache", "none"]
    for teacher in ("teacher", ""):  # and not the live one, unsaid
        code, _, err = kdfast("distill", "c.yaml", *nothing, "--teacher_model_name_or_path", teacher)
        assert (code, "teacher_cache='none' holds nothing; kdfast distill learns" in err) == (2, True), err
    code, _, err = kdfast("cache", "c.yaml", *here)
    assert (code, "no answer in 7 attempts; the last: 503, overloaded. Start the server" in err) == (1, True), err
    assert "disk" not in err


def test_help_names_the_keys(kdfast, capsys):
    with pytest.raises(SystemExit):
        kdfast("cache", "--help")
    out = capsys.readouterr().out
    assert all(f"--{key}" in out for key in ("teacher_model_server_url", "server_kind", "teacher_logprobs"))
    assert "import FILE" in " ".join(out.split())
    with pytest.raises(SystemExit):
        kdfast("distill", "--help")
    assert "server_kind" not in capsys.readouterr().out
