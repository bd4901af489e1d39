"""Teacher caches from a server: a small model behind HTTP, which answers as vLLM and SGLang do, and as none should."""

import json
import threading
from urllib.error import URLError

import pytest
import torch
from byte_tokenizer import make_tokenizer
from datasets import Dataset
from logprob_server import LogProbServer, V, cached, dense, exact, loss_and_gradient
from server import start
from tiny_models import tiny

from kdfast.training import CacheError, TeacherCache, cache_from_server
from kdfast.training.cache import servers

T = 12
TOKENIZER = make_tokenizer()
KEY = "sk-a-secret-of-the-user"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits between attempts are a hundredth; what the server is asked to wait for stays."""
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    for name in servers.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def teacher():
    return tiny("gpt2", V=V, width=32, seed=1, spread=0.6).eval()


@pytest.fixture(params=["vllm", "sglang"])
def server(request, teacher):
    with LogProbServer(teacher, TOKENIZER, request.param, most=V).running() as running:
        yield running


@pytest.fixture
def vllm(teacher):
    with LogProbServer(teacher, TOKENIZER, "vllm").running() as running:
        yield running


def texts(n=8, seed=5):
    ids = torch.randint(3, 250, (n, T), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make(server, folder, data, **options):
    """The rows of `data` with what the server said of them."""
    options = {"kind": server.kind, "tokenizer": TOKENIZER, "dtype": "float32", "shard_tokens": 2 * T, **options}
    options = {"batch_size": 2, "k": 8, "timeout": 60.0, **options}
    cache_from_server(server.url, {"train": data}, folder, **options)
    return TeacherCache(folder).dataset("train", data, temperature=1.0)


def kept(url, folder, ids):
    """What a process of its own does until it is killed."""
    options = {"tokenizer": make_tokenizer(), "dtype": "float32", "shard_tokens": 2 * T, "batch_size": 2, "k": 8}
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    cache_from_server(url, {"train": data}, folder, concurrency=1, **options)


def same(rows, others):
    return all(
        torch.equal(row[name], other[name])
        for row, other in zip(rows, others, strict=True)
        for name in ("teacher_indices", "teacher_log_probs", "teacher_log_tails")
    )


class TestValues:
    @pytest.mark.parametrize("k", [V, 64])
    def test_the_loss_is_the_dense_teacher_s_or_that_of_k_ids_and_the_exact_tail(self, server, teacher, tmp_path, k):
        rows = make(server, tmp_path / "c", texts(), k=k)
        loss, gradient = loss_and_gradient(rows, cached)
        true, true_gradient = loss_and_gradient(rows, dense(teacher) if k == V else exact(teacher, k, True))
        torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-5 * true_gradient.abs().max())
        assert rows.description.source == {
            "kind": server.kind, "url": server.url, "model": "served", "top_k": k, "whole": True
        }  # fmt: skip

    def test_each_row_is_asked_for_once_and_several_at_a_time(self, server, tmp_path):
        data = texts()
        three = threading.Barrier(3)
        server.behave = lambda number, body: three.wait(60) and None if number <= 3 else None
        make(server, tmp_path / "c", data, concurrency=3, shard_tokens=8 * T)
        assert sorted(server.prompts()) == sorted(data["input_ids"])
        assert not three.broken

    def test_documents_of_a_packed_row_are_prompts_of_their_own(self, server, tmp_path):
        data = texts(4)
        alone = make(server, tmp_path / "a", data)
        both = [{"input_ids": data[i]["input_ids"] + data[i + 1]["input_ids"], "seq_lengths": [T, T]} for i in (0, 2)]
        packed = make(server, tmp_path / "b", Dataset.from_list(both))
        expected = torch.cat([alone[2]["teacher_log_probs"], alone[3]["teacher_log_probs"]])
        assert torch.equal(packed[1]["teacher_log_probs"], expected)


class TestFailures:
    """Of a server that fails at times, and what is trained on nevertheless is the truth."""

    @pytest.mark.parametrize(
        "failure",
        [
            ("cut", 100),
            ("cut", 0),
            ("late",),
            ("twice",),
            ("status", 500, {}, "<html><body>Internal Server Error</body></html>"),
            ("status", 200, {"Content-Type": "text/html"}, "<html>Please log in</html>"),
            ("status", 503, {"Retry-After": "0"}, ""),
            ("status", 429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, '{"error": "slow down"}'),
        ],
        ids=lambda failure: "-".join(map(str, failure[:2])),
    )
    def test_a_failed_attempt_is_made_again(self, server, tmp_path, failure):
        data = texts(4)
        expected = make(server, tmp_path / "a", data)
        server.requests.clear()
        server.behave = lambda number, body: failure if number == 1 else None
        found = make(server, tmp_path / "b", data, timeout=2.0 if failure == ("late",) else 60.0)
        server.end.set()
        assert same(found, expected)
        asked = len(server.prompts())
        assert asked >= 6 if failure == ("late",) else asked == (4 if failure == ("twice",) else 6)

    def test_retry_after_is_waited_for(self, server, tmp_path, monkeypatch):
        waits = []
        monkeypatch.setattr(servers, "_pause", lambda stopped, seconds: waits.append(seconds))
        server.behave = lambda number, body: ("status", 429, {"Retry-After": "7"}, "") if number < 3 else None
        make(server, tmp_path / "c", texts(2), concurrency=1)
        assert waits == [7.0, 7.0]
        assert servers._retry_after("100000") == 600.0
        assert servers._retry_after("soon") is None

    def test_waits_double(self, server, tmp_path, monkeypatch):
        waits = []
        monkeypatch.setattr(servers, "FIRST_WAIT", 1.0)
        monkeypatch.setattr(servers, "LONGEST_WAIT", 5.0)
        monkeypatch.setattr(servers.random, "uniform", lambda low, high: high)
        monkeypatch.setattr(servers, "_pause", lambda stopped, seconds: waits.append(seconds))
        server.behave = lambda number, body: ("status", 502, {}, "") if number < 6 else None
        make(server, tmp_path / "c", texts(2), concurrency=1)
        assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]

    def test_no_answer_in_all_attempts_is_an_error_that_keeps_what_is_done(self, server, tmp_path):
        data = texts(8)
        expected = make(server, tmp_path / "a", data)
        server.requests.clear()
        server.behave = lambda number, body: ("status", 503, {}, "overloaded") if number > 2 else None
        with pytest.raises(ConnectionError, match="no answer in 3 attempts; the last: 503, overloaded"):
            make(server, tmp_path / "b", data, retries=2, concurrency=1)
        done = sorted(path.name for path in (tmp_path / "b").glob("train-*"))
        assert done == ["train-00000", "train-00001"]
        server.requests.clear()
        server.behave = lambda number, body: None
        assert same(make(server, tmp_path / "b", data), expected)
        assert sorted(server.prompts()) == sorted(data["input_ids"][4:])  # a shard has two rows

    def test_a_killed_run_goes_on_and_asks_for_what_is_missing(self, vllm, tmp_path):
        """SIGKILL while the third shard is waited for; the server has another address afterwards."""
        data, reached, end = texts(8), threading.Event(), threading.Event()

        def stop(number, body):
            if number > 2:
                reached.set()
                end.wait(60)

        vllm.behave = stop
        (process,) = start(tmp_path, 1, kept, vllm.url, tmp_path / "c", data["input_ids"])
        assert reached.wait(120)
        process.kill()
        process.join()
        end.set()
        assert not (tmp_path / "c" / "summary.json").exists()
        with LogProbServer(vllm.model, TOKENIZER, "vllm").running() as another:
            assert same(make(another, tmp_path / "c", data), make(vllm, tmp_path / "d", data))
            assert sorted(another.prompts()) == sorted(data["input_ids"][4:])

    def test_nobody_is_there(self, server, tmp_path):
        server.url = "http://127.0.0.1:9"
        with pytest.raises(
            ConnectionError, match=r"127.0.0.1:9/v1/models: no answer in 2 attempts; the last: URLError"
        ):
            make(server, tmp_path / "c", texts(2), retries=1)
        assert not (tmp_path / "c").exists()
        assert issubclass(URLError, OSError)

    def test_a_wait_is_said(self, server, tmp_path):
        """At the second failure: one may be a server that is asked too often."""
        said = []
        server.behave = lambda number, body: ("status", 429, {}, "busy") if number == 1 else None
        make(server, tmp_path / "a", texts(2), tell=said.append)
        assert len(said) == 2, said  # whom it asks, and what the cache takes
        server.behave = lambda number, body: ("status", 503, {}, "loading") if number in (3, 4, 5) else None
        make(server, tmp_path / "b", texts(2), tell=said.append, concurrency=1)
        (waits,) = [line for line in said if "no answer yet" in line]
        assert "no answer yet: 503, loading; 5 more attempts follow" in waits

    def test_a_complete_cache_needs_no_server(self, vllm, tmp_path):
        data, said = texts(2), []
        expected = make(vllm, tmp_path / "c", data)
        vllm.url = "http://127.0.0.1:9"
        assert same(make(vllm, tmp_path / "c", data, tell=said.append), expected)
        assert not said
        with pytest.raises(CacheError, match="something else"):
            make(vllm, tmp_path / "c", data, k=7)

    def test_what_was_refused_can_be_asked_for_otherwise_in_the_same_folder(self, vllm, tmp_path):
        vllm.most = 20
        with pytest.raises(CacheError, match="Start the server with --max-logprobs 64, or lower cache_top_k"):
            make(vllm, tmp_path / "c", texts(2), k=64)
        make(vllm, tmp_path / "c", texts(2), k=20)
        with pytest.raises(CacheError, match="something else"):
            make(vllm, tmp_path / "c", texts(2), k=10)


def in_first(change):
    """Change the first answer's entries, by `change(list, kind)`."""

    def of(answer):
        one = answer["choices"][0] if isinstance(answer, dict) else answer[0]["meta_info"]
        change(one, "prompt_logprobs" if isinstance(answer, dict) else "input_top_logprobs")
        return answer

    return "change", of


def set_nan(one, name):
    entries = one[name][3]
    if name == "prompt_logprobs":
        next(iter(entries.values()))["logprob"] = float("nan")
    else:
        entries[-1][0] = float("nan")


def other_ids(one, name):
    if name == "prompt_logprobs":
        one[name][3] = {str(int(i) + 300): x for i, x in one[name][3].items()}
    else:
        one["input_token_logprobs"][3][1] = 256


def outside(one, name):
    if name == "prompt_logprobs":
        one[name][3]["400"] = {"logprob": -3.0}
    else:
        one[name][3].append([-3.0, 400, None])


def other_words(one, name):
    for entries in one[name][1:]:
        for entry in entries.values() if name == "prompt_logprobs" else entries:
            if name == "prompt_logprobs":
                entry["decoded_token"] = "other"
            else:
                entry[2] = "other"


def shorter(one, name):
    one[name].pop(1)
    if name == "input_top_logprobs":
        one["input_token_logprobs"].pop(1)


WRONG = {
    "another length": (in_first(shorter), "(has 11 positions for 12 tokens|input_ids are other tokens)"),
    "other tokens": (in_first(other_ids), "(not among the ids there|are other tokens)"),
    "no number": (in_first(set_nan), "has nan, which is no number"),
    "another vocabulary": (in_first(outside), "id 400 has -3, and the tokenizer 257 ids"),
    "other words": (in_first(other_words), "ids are other words than in the tokenizer"),
    "no log-probabilities": (in_first(lambda one, name: one.pop(name)), "answered without (prompt|input_top)_logprobs"),
    "nothing": (("json", {}), "answered 2 prompts with {}; expected an answer to each"),
    "one answer": (("change", lambda x: x[:1] if isinstance(x, list) else {"choices": x["choices"][:1]}), "answered 2"),
    "an answer twice": (
        ("change", lambda x: [x[0]] * 3 if isinstance(x, list) else {"choices": x["choices"] + x["choices"][:1]}),
        "answered 2 prompts",
    ),
    "one in the other's place": (
        ("change", lambda x: x[::-1] if isinstance(x, list) else {"choices": [
            {**one, "index": 1 - one["index"]} for one in x["choices"]]}),
        "(not among the ids there|are other tokens)",
    ),
    "in the middle of a page": (
        ("status", 404, {}, "<html>Not Found</html>"),
        "refuses: 404, <html>Not Found</html>. Expected the address of a",
    ),
    "another address": (("status", 307, {"Location": "http://elsewhere.example"}, ""), "name the address"),
}  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize("wrong", WRONG)
    def test_what_does_not_fit(self, server, tmp_path, wrong):
        told, message = WRONG[wrong]
        server.behave = lambda number, body: told
        with pytest.raises(CacheError, match=message):
            make(server, tmp_path / "c", texts(4))
        assert not list((tmp_path / "c").glob("train-*"))

    def test_more_entries_than_the_server_gives(self, vllm, tmp_path):
        with pytest.raises(CacheError, match=r"greater than max allowed: 64\. Start the server with --max-logprobs 65"):
            make(vllm, tmp_path / "c", texts(2), k=65)

    def test_text_longer_than_the_model_s_context(self, server, tmp_path):
        server.context = T
        with pytest.raises(CacheError, match="a context of 12 tokens, and a document of the text 12"):
            make(server, tmp_path / "c", texts(2))
        assert server.prompts() == []
        server.context = T + 1
        assert len(make(server, tmp_path / "c", texts(2))) == 2

    def test_another_model_or_none(self, server, tmp_path):
        with pytest.raises(CacheError, match="serves served; expected other"):
            make(server, tmp_path / "c", texts(2), model="other")
        assert len(make(server, tmp_path / "c", texts(2), model="served")) == 2
        server.models = lambda: {"data": []}
        with pytest.raises(CacheError, match="serves no model; expected one"):
            make(server, tmp_path / "d", texts(2))

    def test_a_limit_of_tokens(self, server, tmp_path):
        """What is sent, failed attempts too, stays below it, and what is done is kept."""
        data = texts(8)
        server.behave = lambda number, body: ("status", 500, {}, "") if number == 1 else None
        with pytest.raises(
            CacheError, match="token_limit=80 is reached: 72 prompt tokens have been sent, and the next"
        ):
            make(server, tmp_path / "c", data, token_limit=80, concurrency=1)
        assert len(server.prompts()) * T == 72
        assert len(list((tmp_path / "c").glob("train-*"))) == 2
        server.requests.clear()
        server.behave = lambda number, body: None
        make(server, tmp_path / "c", data, token_limit=48)
        assert len(server.prompts()) * T == 48
        make(server, tmp_path / "c", data, token_limit=1)  # nothing is left to ask for

    def test_a_limit_below_a_shard_would_keep_nothing_ever(self, server, tmp_path):
        with pytest.raises(CacheError, match="token_limit=23; expected at least 24: a shard has 24 tokens"):
            make(server, tmp_path / "c", texts(8), token_limit=23)
        assert not server.prompts()

    def test_options(self, server, tmp_path):
        data = {"train": texts(2)}
        for message, options in {
            "kind='tgi'; expected 'vllm' or 'sglang'": {"kind": "tgi"},
            "concurrency=0; expected an int of at least 1": {"concurrency": 0},
            "token_limit=0; expected an int of at least 1, or None": {"token_limit": 0},
            "k=0; expected": {"k": 0},
        }.items():
            with pytest.raises(ValueError, match=message):
                cache_from_server(server.url, data, tmp_path / "c", tokenizer=TOKENIZER, **options)
        for url in ("localhost:8000", "ftp://x", "http://"):
            with pytest.raises(ValueError, match="expected http://host:port"):
                cache_from_server(url, data, tmp_path / "c", tokenizer=TOKENIZER)


class TestKey:
    def test_it_is_sent_and_never_kept(self, server, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
        monkeypatch.setenv("KDFAST_SERVER_API_KEY", KEY)
        told = []
        make(server, tmp_path / "c", texts(4), tell=told.append)
        assert {headers.get("Authorization") for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
        for path in (tmp_path / "c").rglob("*"):
            assert not path.is_file() or KEY.encode() not in path.read_bytes()
        assert KEY not in str(told)
        monkeypatch.delenv("KDFAST_SERVER_API_KEY")
        server.requests.clear()
        make(server, tmp_path / "d", texts(2))
        assert server.requests[0][1]["Authorization"] == "Bearer sk-another"

    def test_a_server_that_repeats_it(self, server, tmp_path, monkeypatch):
        message = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
        server.behave = lambda number, body: ("status", 401, {}, message)
        with pytest.raises(CacheError, match=r"Set KDFAST_SERVER_API_KEY in the environment$"):
            make(server, tmp_path / "c", texts(2))
        monkeypatch.setenv("KDFAST_SERVER_API_KEY", KEY)
        with pytest.raises(
            CacheError, match=r"provided: …\. Set .* in the environment, which has another key"
        ) as refused:
            make(server, tmp_path / "c", texts(2))
        assert KEY not in str(refused.value)
        assert refused.value.__cause__ is None
        server.behave = lambda number, body: ("status", 500, {}, message)
        with pytest.raises(ConnectionError) as failed:
            make(server, tmp_path / "c", texts(2), retries=1)
        assert KEY not in str(failed.value)

    def test_none_in_the_address(self, server, tmp_path):
        for url in (f"http://user:{KEY}@127.0.0.1", f"http://127.0.0.1?key={KEY}", f"http://127.0.0.1#{KEY}"):
            with pytest.raises(ValueError, match="had credentials or a query in it") as refused:
                cache_from_server(url, {"train": texts(2)}, tmp_path / "c", tokenizer=TOKENIZER)
            assert KEY not in str(refused.value)
