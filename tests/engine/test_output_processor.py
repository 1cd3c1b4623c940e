"""Text out of tokens: whole characters, stop strings wherever they are cut, logprobs, errors, and nothing after the end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmv1.engine.output_processor import CompletionDelta, OutputProcessor
from mmv1.errors import EngineError, ImageError, RequestError
from mmv1.types import EngineCoreOutput, EngineCoreRequest, FinishReason, SamplingParams, TokenLogprobs


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["hello world, the red square and the blue circle"] * 4
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return tokenizer


TOKENIZER = make_tokenizer()
EOS = TOKENIZER.token_to_id("<|im_end|>")
BYTE_TOKENS = {TOKENIZER.decode([i]): i for i in range(256)}  # single ASCII characters


class Client:
    """A processor with one request in it, and what was emitted."""

    def __init__(self, **params: object) -> None:
        self.deltas: list[CompletionDelta] = []
        self.processor = OutputProcessor(TOKENIZER)
        request = EngineCoreRequest(
            request_id="r-0", prompt_token_ids=[1, 2, 3], sampling_params=SamplingParams(**params), max_tokens=1000
        )
        self.processor.add_request(request, parent_id="r", index=0, emit=self.deltas.append)

    def send(self, token_ids: list[int], finish: FinishReason | None = None, **news: object) -> list[str]:
        return self.processor.process([EngineCoreOutput("r-0", token_ids, finish, **news)])

    @property
    def text(self) -> str:
        return "".join(delta.output.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.output.token_ids]


def run(token_ids: list[int], cuts: list[int], **params: object) -> tuple[Client, list[str]]:
    """Send tokens in pieces that end at `cuts`; stop as the core would when told to abort."""
    client = Client(**params)
    edges = [0, *sorted(cut % (len(token_ids) + 1) for cut in cuts), len(token_ids)]
    for start, end in itertools.pairwise(edges):
        if aborted := client.send(token_ids[start:end]):
            return client, aborted
    return client, client.send([], FinishReason.LENGTH)


def expected_text(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Read character by character: the first moment at which the text ends with a stop string; the longest of them."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abc é😀", max_size=30),
    st.lists(st.text(alphabet="abc é😀", min_size=1, max_size=4), max_size=4, unique=True),
    st.lists(st.integers(0, 200), max_size=20),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut(text, stops, cuts, include, random) -> None:
    token_ids = [token_id for character in text for token_id in byte_ids(character)]
    if random.random() < 0.5:
        token_ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    client, _ = run(token_ids, cuts, stop=tuple(stops), include_stop_str_in_output=include)
    wanted, stop = expected_text(text, stops, include)
    assert client.text == wanted
    last = client.deltas[-1].output
    assert (last.finish_reason, last.stop_reason) == (("stop", stop) if stop else ("length", None))
    assert client.processor.num_unfinished == 0
    assert not any(delta.output.finish_reason for delta in client.deltas[:-1])


def byte_ids(text: str) -> list[int]:
    """One token per UTF-8 byte."""
    names = [TOKENIZER.pre_tokenizer.pre_tokenize_str(character)[0][0] for character in text]
    return [TOKENIZER.token_to_id(name) for name in "".join(names)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=200), st.lists(st.integers(0, 400), max_size=30))
def test_any_tokens_put_together_are_the_text_of_all(token_ids, cuts) -> None:
    client, _ = run(token_ids, cuts)
    assert client.text == TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert client.token_ids == token_ids


def test_a_character_appears_with_its_last_byte() -> None:
    client = Client()
    for token_id in byte_ids("😀"):
        assert client.text == ""
        client.send([token_id])
    assert client.text == "😀"


def test_an_unfinished_character_at_the_end_is_not_lost() -> None:
    client = Client()
    client.send(byte_ids("a😀")[:3])
    client.send([], FinishReason.LENGTH)
    assert client.text == "a\ufffd"


@pytest.mark.parametrize("token_id", [byte_ids("😀")[0], EOS])
def test_a_long_run_without_text_costs_no_more_than_text(token_id: int) -> None:
    """The stream is restarted: what it holds, and so the cost of a token, stays bounded."""
    client = Client()
    for _ in range(5000):
        client.send([token_id])
    state = client.processor._requests["r-0"]
    assert len(state.detokenizer._pending) <= 64
    client.send(byte_ids("😀 ok"), FinishReason.LENGTH)
    assert client.text.endswith("😀 ok")
    assert client.text.count("\ufffd") == (5000 if token_id != EOS else 0)


def test_text_that_may_begin_a_stop_string_is_held_back_and_given_out_later() -> None:
    client = Client(stop=("END.",))
    client.send(byte_ids("x EN"))
    assert client.text == "x "
    client.send(byte_ids("D"))
    assert client.text == "x "
    client.send(byte_ids("!"))
    assert client.text == "x END!"


def test_held_back_text_is_given_out_at_the_end() -> None:
    client = Client(stop=("END.",))
    client.send(byte_ids("x EN"), FinishReason.LENGTH)
    assert client.text == "x EN"
    assert client.deltas[-1].output.finish_reason == "length"


def test_a_stop_string_aborts_the_core_request_and_later_news_is_ignored() -> None:
    client = Client(stop=("lo w",))
    token_ids = byte_ids("hello world")
    assert client.send(token_ids) == ["r-0"]
    assert client.text == "hel"
    assert client.token_ids == token_ids[: len("hello w")]
    assert client.deltas[-1].output.stop_reason == "lo w"
    assert client.send([5], FinishReason.STOP) == []
    assert len(client.deltas) == 1


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens() -> None:
    client = Client(stop=("a",), min_tokens=3)
    client.send(byte_ids("aab"))
    client.send(byte_ids("cad"))
    assert "".join(delta.output.text for delta in client.deltas) == "aabc"
    assert client.deltas[-1].output.stop_reason == "a"


def test_a_stop_string_found_with_the_last_tokens_aborts_nothing() -> None:
    client = Client(stop=("o",))
    assert client.send(byte_ids("no"), FinishReason.LENGTH) == []
    assert client.deltas[-1].output.finish_reason == "stop"


def test_the_end_token_is_counted_but_not_shown() -> None:
    client = Client(skip_special_tokens=False)
    client.send([*byte_ids("ok"), EOS], FinishReason.STOP)
    assert client.text == "ok"
    assert client.token_ids[-1] == EOS
    output = client.deltas[-1].output
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_the_stop_token_is_shown_when_asked_for() -> None:
    client = Client(include_stop_str_in_output=True, stop_token_ids=(BYTE_TOKENS["."],))
    client.send([*byte_ids("ok"), BYTE_TOKENS["."]], FinishReason.STOP, stop_reason=BYTE_TOKENS["."])
    assert client.text == "ok."
    assert client.deltas[-1].output.stop_reason == BYTE_TOKENS["."]


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|im_end|>b")])
def test_special_tokens_in_the_middle(skip: bool, text: str) -> None:
    client = Client(skip_special_tokens=skip, ignore_eos=True)
    client.send([*byte_ids("a"), EOS, *byte_ids("b")], FinishReason.LENGTH)
    assert client.text == text


def test_logprobs_carry_token_text_and_bytes() -> None:
    client = Client(logprobs=2)
    first_byte = byte_ids("é")[0]
    position = TokenLogprobs([first_byte, BYTE_TOKENS["a"], first_byte], [-1.5, -0.5, float("-inf")], 2)
    client.send([first_byte], new_logprobs=[position], num_cached_tokens=2)
    delta = client.deltas[0]
    assert delta.num_cached_tokens == 2
    assert delta.num_prompt_tokens == 3
    (logprobs,) = delta.output.logprobs
    assert (logprobs.sampled.token, logprobs.sampled.utf8, logprobs.sampled.logprob) == ("\ufffd", "é".encode()[:1], -1.5)
    assert logprobs.rank == 2
    assert [(top.token, top.utf8) for top in logprobs.top] == [("a", b"a"), ("\ufffd", b"\xc3")]
    assert logprobs.top[1].logprob == -9999.0


def test_logprobs_end_with_the_stop_string() -> None:
    client = Client(logprobs=0, stop=("b",))
    token_ids = byte_ids("abc")
    client.send(token_ids, new_logprobs=[TokenLogprobs([token_id], [-1.0], 1) for token_id in token_ids])
    assert [position.sampled.token for position in client.deltas[0].output.logprobs] == ["a", "b"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [("invalid_image", ImageError), ("invalid_value", RequestError), ("internal_error", EngineError), (None, EngineError)],
)
def test_an_error_of_the_core_becomes_the_last_delta(code: str | None, kind: type[Exception]) -> None:
    client = Client()
    assert client.send([], FinishReason.ERROR, error="the picture is damaged", error_code=code) == []
    error = client.deltas[0].error
    assert type(error) is kind
    assert str(error) == "the picture is damaged"
    if isinstance(error, RequestError):
        assert (error.code, error.status) == (code, 400)
    assert client.processor.num_unfinished == 0


def test_aborted_and_unknown_requests_emit_nothing() -> None:
    client = Client()
    client.processor.abort(["r-0", "nobody"])
    assert client.processor.num_unfinished == 0
    assert client.send(byte_ids("x")) == []
    assert client.deltas == []
