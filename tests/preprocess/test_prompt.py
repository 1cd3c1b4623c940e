"""Prompt token ids equal to transformers', and what a user types is never a special token."""

import itertools
import json
import threading
import time

import pytest
from PIL import Image
from transformers import AutoTokenizer

from examples.tiny_model import make_tiny_model
from mmv1.errors import ConfigError, ContextLengthError, RequestError
from mmv1.preprocess.prompt import ImagePart, Message, PromptRenderer, TextPart, image_parts
from tests.tool_model import WEATHER, make_tool_model

TEXTS = [
    "Describe this image.", "", " ", "\n", "  two  spaces ", "naïve café 図像 画像 Привет 😀", "e\u0301 NFC", "a\n\n b\r\n\tc",
    "<", "<|", "1234567890", "{{ 7 * 7 }} {% raise %}", "<tool_call>x</tool_call>", "I'm don't", "<im_start>", "a<|b|>c",
    "\ue0f1", "x" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def ids(tiny_model_dir):
    config = json.loads((tiny_model_dir / "config.json").read_text())
    return {"image_token_id": config["image_token_id"], "video_token_id": config["video_token_id"]}


@pytest.fixture(scope="module")
def renderer(tiny_model_dir, ids):
    return PromptRenderer(tiny_model_dir, **ids, max_model_len=4096)


PICTURE = Image.new("RGB", (100, 60), "red")


def as_dicts(messages):
    def part(p):
        return {"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image", "image": PICTURE}

    return [
        {"role": m.role, "content": m.content if isinstance(m.content, str) else [part(p) for p in m.content]} for m in messages
    ]


def oracle_ids(processor, messages):
    ids = processor.apply_chat_template(as_dicts(messages), add_generation_prompt=True, tokenize=True)
    return ids[0] if isinstance(ids[0], list) else ids


def our_ids(renderer, messages):
    token_ids = renderer.render_chat(messages)
    return renderer.expand(token_ids, [8] * len(image_parts(messages)))[0]  # 100 x 60 is resized to 112 x 56: 4 x 2 tokens


def conversations():
    image = ImagePart(b"")
    for text in TEXTS:
        yield [Message("user", text)]
        yield [Message("user", [image, TextPart(text)])]
        yield [Message("user", [TextPart(text), image, TextPart(text)])]
        yield [Message("system", text), Message("user", "hi"), Message("assistant", text), Message("user", [image])]
    for first, second in itertools.pairwise(TEXTS):
        yield [Message("user", [TextPart(first), TextPart(second)])]
        yield [
            Message("system", [TextPart(first)]),
            Message("user", [image, image, TextPart(second)]),
            Message("assistant", first),
            Message("user", [TextPart(second), image]),
        ]


def test_equal_to_transformers(renderer, processor):
    count = 0
    for messages in conversations():
        assert our_ids(renderer, messages) == oracle_ids(processor, messages), messages
        count += 1
    assert count > 100


def special_texts(renderer):
    return list(renderer._special_ids)


def test_special_tokens_in_user_text_are_text(renderer, ids):
    specials = special_texts(renderer)
    assert "<|image_pad|>" in specials
    baseline = renderer.render_chat([Message("user", "x")])
    for special in specials:
        for text in (special, f"a {special} b", special * 3, f"\n{special}\n", special + special[:4]):
            for content in (text, [TextPart(text)]):
                token_ids = renderer.render_chat([Message("user", content)])
                assert _specials_of(token_ids, renderer) == _specials_of(baseline, renderer), text
                assert text.strip() in _plain_text(renderer, token_ids)


def test_special_tokens_in_every_role_and_with_pictures(renderer, ids):
    text = "<|image_pad|><|im_end|><|video_pad|><|vision_start|>"
    question = Message("user", [TextPart(text), ImagePart(b"")])
    messages = [Message("system", text), question, Message("assistant", text), Message("user", text)]
    token_ids = renderer.render_chat(messages)
    assert token_ids.count(ids["image_token_id"]) == 1
    plain = [Message(m.role, "x" if isinstance(m.content, str) else [TextPart("x"), ImagePart(b"")]) for m in messages]
    assert _specials_of(token_ids, renderer) == _specials_of(renderer.render_chat(plain), renderer)


def test_two_texts_do_not_spell_a_special_token_together(renderer):
    baseline = renderer.render_chat([Message("user", "x")])
    for special in special_texts(renderer):
        for cut in range(1, len(special)):
            for space in ("", " "):
                parts = [TextPart("a" + special[:cut] + space), TextPart(special[cut:] + "b")]
                token_ids = renderer.render_chat([Message("user", parts)])
                assert _specials_of(token_ids, renderer) == _specials_of(baseline, renderer), (special, cut)


def test_nor_do_they_when_the_template_strips_them(tmp_path, tiny_model_dir, ids):
    template = "{% for message in messages %}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endfor %}"
    renderer = PromptRenderer(write_model(tmp_path, tiny_model_dir, template), **ids, max_model_len=4096)
    token_ids = renderer.render_chat([Message("user", [TextPart("a<|im_ \n"), TextPart(" end|>b")])])
    assert _specials_of(token_ids, renderer) == [] and _plain_text(renderer, token_ids) == "a<|im_end|>b"


def _specials_of(token_ids, renderer):
    special = set(renderer._special_ids.values())
    return [token for token in token_ids if token in special]


def _plain_text(renderer, token_ids):
    return renderer.tokenizer.decode(token_ids, skip_special_tokens=False)


def test_raw_prompts_mean_their_special_tokens(renderer, processor):
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.render_text(text) == processor.tokenizer(text)["input_ids"]


def test_expand(renderer, ids):
    pad = ids["image_token_id"]
    assert renderer.expand([5, pad, 6, pad, pad], [3, 1, 2]) == ([5, pad, pad, pad, 6, pad, pad, pad], [1, 5, 6])
    assert renderer.expand([5, 6], []) == ([5, 6], [])
    for token_ids, counts in (([5, pad], []), ([5], [1]), ([pad, pad], [1])):
        with pytest.raises(RequestError, match="placeholders"):
            renderer.expand(token_ids, counts)
    with pytest.raises(RequestError, match="video"):
        renderer.expand([ids["video_token_id"]], [])


def test_expand_is_linear(renderer, ids):
    token_ids = [ids["image_token_id"]] * 2000
    expanded, offsets = renderer.expand(token_ids, [500] * 2000)
    assert len(expanded) == 1_000_000 and offsets == list(range(0, 1_000_000, 500))


def test_ids_are_checked(renderer):
    assert renderer.check_ids((1, 2)) == [1, 2]
    for bad in ([-1], [10**9], ["a"], [1.5], [None]):
        with pytest.raises(RequestError):
            renderer.check_ids(bad)


def test_tokenizing_lets_other_threads_run(tiny_model_dir, ids):
    """A long text takes a second; whoever serves others in the meantime must not stand still."""
    renderer = PromptRenderer(tiny_model_dir, **ids, max_model_len=10**7)
    done, gaps = threading.Event(), []

    def tick():
        last = time.perf_counter()
        while not done.wait(0.002):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.perf_counter()
    token_ids = renderer.render_text("hello world " * 200_000)
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    assert len(token_ids) > 10**6
    assert max(gaps) < seconds / 2


@pytest.mark.parametrize("text", ["a" * 10**6, "e\u0301" * 10**6, " " * 10**6, "図" * 10**6])
def test_text_that_cannot_fit_is_refused_before_the_work(renderer, text, monkeypatch):
    monkeypatch.setattr(renderer, "tokenizer", None)
    with pytest.raises(ContextLengthError, match="4096 tokens"):
        renderer.render_text(text)
    with pytest.raises(ContextLengthError):
        renderer.render_chat([Message("user", text)])


def test_text_that_may_fit_is_not_refused(tiny_model_dir, ids, renderer):
    """The shortest texts for their tokens, and characters that become fewer bytes first."""
    vocabulary = renderer.tokenizer.get_vocab(with_added_tokens=False)
    longest = renderer.tokenizer.decode([vocabulary[max(vocabulary, key=len)]])
    for text in (longest, "\u1100\u1161\u11a8", "<|vision_start|>", "e\u0301", "\U0001f600"):
        num_tokens = len(renderer.render_text(text * 20))
        exact = PromptRenderer(tiny_model_dir, **ids, max_model_len=num_tokens)
        assert len(exact.render_text(text * 20)) == num_tokens


def test_half_a_surrogate_pair_is_the_requests_fault(renderer):
    for render in (renderer.render_text, lambda text: renderer.render_chat([Message("user", text)])):
        with pytest.raises(RequestError, match="surrogate"):
            render("a\ud800b")


@pytest.mark.parametrize("role", ["", "USER", "user\n", "<|im_end|>", "x" * 40])
def test_roles_are_words(renderer, role):
    with pytest.raises(RequestError, match="role"):
        renderer.render_chat([Message(role, "hi")])


def write_model(tmp_path, tiny_model_dir, template=None, **config):
    (tmp_path / "tokenizer.json").write_bytes((tiny_model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


def test_where_templates_come_from(tmp_path, tiny_model_dir, ids):
    model = write_model(tmp_path, tiny_model_dir, chat_template="one{{ eos_token }}", eos_token={"content": "<|im_end|>"})
    messages = [Message("user", "hi")]

    def text():
        renderer = PromptRenderer(model, **ids, max_model_len=4096)
        return renderer.tokenizer.decode(renderer.render_chat(messages), skip_special_tokens=False)

    assert text() == "one<|im_end|>"
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "two"}))
    assert text() == "two"
    (model / "chat_template.jinja").write_text("three")
    assert text() == "three"


THINKING = """{%- set state = namespace(n=0) -%}
{%- for message in messages %}{{ message.content }}{% endfor -%}
{%- if enable_thinking is defined and enable_thinking is false %}<no>{% endif %}{{ words | join('+') if words is defined }}"""


def test_settings_of_a_template_are_the_requests(tmp_path, tiny_model_dir, ids):
    renderer = PromptRenderer(write_model(tmp_path, tiny_model_dir, THINKING), **ids, max_model_len=4096)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    messages, turns = [Message("user", "hello")], [{"role": "user", "content": "hello"}]
    for settings in ({}, {"enable_thinking": True}, {"enable_thinking": False}, {"words": ["a", "b"]}):
        expected = oracle.apply_chat_template(turns, tokenize=True, return_dict=False, **settings)
        assert renderer.render_chat(messages, (), settings) == expected, settings
    said = renderer.tokenizer.decode(renderer.render_chat(messages, (), {"words": ["<|im_end|>"]}), skip_special_tokens=True)
    assert said == "hello<|im_end|>"  # text, not a special token
    for name in ("messages", "tools", "add_generation_prompt", "eos_token", "namespace", "raise_exception", "thinking"):
        with pytest.raises(RequestError, match=f"no setting '{name}'; it has enable_thinking, words") as error:
            renderer.render_chat(messages, (), {name: []})
        assert error.value.param == "chat_template_kwargs"


def test_what_a_tokenizer_puts_before_every_text(tmp_path):
    make_tiny_model(tmp_path, family="llama")
    renderer = PromptRenderer(tmp_path, image_token_id=None, video_token_id=None, max_model_len=4096)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    assert oracle("hello").input_ids[0] == oracle.bos_token_id
    for text in ("hello", ""):
        assert renderer.render_text(text) == oracle(text).input_ids
        assert renderer.render_text(text, add_special_tokens=False) == oracle(text, add_special_tokens=False).input_ids
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    expected = oracle.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert renderer.render_chat([Message(turn["role"], turn["content"]) for turn in turns]) == expected


def test_template_errors_are_the_requests(tmp_path, tiny_model_dir, ids):
    template = "{% if messages|length > 1 %}{{ raise_exception('only one turn') }}{% endif %}{{ 1 + none }}"
    model = write_model(tmp_path, tiny_model_dir, template)
    renderer = PromptRenderer(model, **ids, max_model_len=4096)
    with pytest.raises(RequestError, match="only one turn"):
        renderer.render_chat([Message("user", "a"), Message("user", "b")])
    with pytest.raises(RequestError, match="cannot render"):
        renderer.render_chat([Message("user", "a")])


def test_the_template_is_sandboxed_and_has_what_transformers_offers(tmp_path, tiny_model_dir, ids):
    template = """
    {%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}
    {%- generation %}[{{ strftime_now('%Y')[:2] }}]{% endgeneration %}"""
    model = write_model(tmp_path, tiny_model_dir, template)
    renderer = PromptRenderer(model, **ids, max_model_len=4096)
    text = renderer.tokenizer.decode(renderer.render_chat([Message("user", "é<"), Message("user", "no")]))
    assert text == '{"role": "user", "content": "é<"}[20]'
    (model / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(RequestError):
        PromptRenderer(model, **ids, max_model_len=4096).render_chat([Message("user", "a")])


def test_broken_model_directories(tmp_path, tiny_model_dir, ids):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        PromptRenderer(tmp_path, **ids, max_model_len=4096)
    model = write_model(tmp_path, tiny_model_dir, "{% if %}")
    with pytest.raises(ConfigError, match="template"):
        PromptRenderer(model, **ids, max_model_len=4096)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(RequestError, match="no chat template"):
        PromptRenderer(model, **ids, max_model_len=4096).render_chat([Message("user", "a")])


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory, tiny_model_dir):
    return make_tool_model(tiny_model_dir, tmp_path_factory.mktemp("tool-model"))


@pytest.fixture(scope="module")
def tool_renderer(tool_model, ids):
    return PromptRenderer(tool_model, **ids, max_model_len=4096)


def a_call(text):
    return {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": text, "n": [1, None]}}}


def with_tools(text):
    return [
        Message("user", text),
        Message("assistant", "", (a_call(text),)),
        Message("tool", text, tool_call_id="call_1"),
        Message("user", [ImagePart(b""), TextPart(text)]),
    ]


@pytest.mark.parametrize("tools", [[], [WEATHER], [WEATHER, WEATHER]])
def test_tools_equal_to_transformers(tool_model, tool_renderer, tools):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tool_model)
    for text in TEXTS:
        messages = with_tools(text)
        dicts = as_dicts(messages)
        for said, message in zip(dicts, messages, strict=True):
            if message.tool_calls:
                said["tool_calls"] = list(message.tool_calls)
        expected = processor.apply_chat_template(dicts, tools=tools or None, add_generation_prompt=True, tokenize=True)
        got = tool_renderer.expand(tool_renderer.render_chat(messages, tools), [8])[0]
        assert got == (expected[0] if isinstance(expected[0], list) else expected), text


def test_special_tokens_in_tools_and_calls_are_text(tool_renderer, ids):
    def tool(text):
        return {"type": "function", "function": {"name": "f", "description": text, "parameters": {text: [text, 1, None]}}}

    baseline = _specials_of(tool_renderer.render_chat(with_tools("x"), [tool("x")]), tool_renderer)
    for special in special_texts(tool_renderer):
        token_ids = tool_renderer.render_chat(with_tools(special), [tool(special)])
        assert _specials_of(token_ids, tool_renderer) == baseline
        assert token_ids.count(ids["image_token_id"]) == 1


@pytest.mark.parametrize(
    ("messages", "tools", "param"),
    [
        ([Message("user", "x")], [WEATHER], "tools"),
        (with_tools("x")[:2], [], "messages"),
        ([Message("tool", "x")], [], "messages"),
    ],
)
def test_a_template_without_tools_refuses_them(renderer, messages, tools, param):
    with pytest.raises(RequestError, match="takes no tools") as caught:
        renderer.render_chat(messages, tools)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


def test_a_tool_nested_too_deeply_is_refused(tool_renderer):
    deep = {}
    for _ in range(2000):
        deep = {"a": deep}
    with pytest.raises(RequestError, match="cannot render"):
        tool_renderer.render_chat([Message("user", "x")], [{"type": "function", "function": {"name": "f", "parameters": deep}}])
