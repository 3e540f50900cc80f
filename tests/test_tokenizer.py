"""Our tokenizer and chat templates against those of transformers, and the limits on templates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from dynamoe.dynamic.text.chat_template import ChatTemplate, RenderLimits
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.dynamic.text.tokenizer_file import _check_part

TEXTS = [
    "The capital of France is Paris.",
    "  leading, trailing  ",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
    "日本語 🙂 naïve\x00\t\r\n",
    "a<b",
    "",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": 'Be <brief> & "kind".'},
        {"role": "user", "content": "Hé, 日本"},
        {"role": "assistant", "content": "Yes.", "tool_calls": None},
        {"role": "user", "content": "And now?"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]


def copy_with(source: Path, target: Path, **settings: object) -> Path:
    """A copy of a checkpoint's tokenizer files with changed settings; None removes one."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    file = target / "tokenizer_config.json"
    merged = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))
    return target


def same_as_transformers(tokenizer: Tokenizer) -> None:
    theirs = tokenizer.hf()
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert tokenizer.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.special_tokens == theirs.special_tokens_map
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert set(theirs.all_special_ids) <= tokenizer.special_ids


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False}},
        {"extra_special_tokens": ["<b", "<|tool|>"]},
        {"added_tokens_decoder": {"320": {"content": "<b", "special": False, "normalized": False}}},
        {"unk_token": "<|unknown|>", "pad_token": None},
        {"split_special_tokens": True},
        {"add_prefix_space": True, "legacy": False, "do_lower_case": True},
    ],
)
def test_encoding_and_decoding_equal_transformers(checkpoint: Path, tmp_path: Path, settings: dict) -> None:
    same_as_transformers(Tokenizer.from_directory(copy_with(checkpoint, tmp_path / "t", **settings)))


def test_a_tokenizer_without_a_fast_file_is_converted(checkpoint: Path, tmp_path: Path) -> None:
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ messages[0].content }}", **names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_directory(tmp_path)
    same_as_transformers(tokenizer)
    assert tokenizer.chat_prompt(CHATS[0]) == CHATS[0][0]["content"]


def test_a_fast_file_needs_no_transformers(checkpoint: Path) -> None:
    program = (
        "import sys; from dynamoe.dynamic.text.tokenizer import Tokenizer; "
        f"t = Tokenizer.from_directory({str(checkpoint)!r}); t.encode('a'); "
        "t.chat_prompt([{'role': 'user', 'content': 'a'}]); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unusable_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable tokenizer"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_directory(tmp_path)


def added(file: dict, **token: object) -> None:
    file["added_tokens"][0] |= token


ODD_FILES = [
    (lambda file: file.update(made_up=1), "tokenizer.json cannot be read"),
    (lambda file: file["pre_tokenizer"].update(made_up=1), "pre_tokenizer/'made_up' is unknown"),
    (lambda file: file["model"].update(dropout=0.1), "model/dropout=0.1 leaves out merges by chance"),
    (lambda file: file["model"]["vocab"].update({"ab": 300}), "model/vocab gives '.*' and 'ab' the same id"),
    (lambda file: added(file, id=7), "added_tokens gives '<|endoftext|>' the id 7, but it has 0"),
    (lambda file: added(file, made_up=True), "added_tokens/'made_up' is unknown"),
]


@pytest.mark.parametrize(("change", "message"), ODD_FILES, ids=[message for _, message in ODD_FILES])
def test_what_the_library_passes_over_is_refused(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    path = copy_with(checkpoint, tmp_path / "t")
    file = json.loads((path / "tokenizer.json").read_text())
    change(file)
    (path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        Tokenizer.from_directory(path)


ODD_SETTINGS = [
    ("tokenizer_config.json", [1], "must hold a JSON object, not list"),
    ("tokenizer_config.json", {"eos_token": 5}, "eos_token must be a token, not '5'"),
    ("tokenizer_config.json", {"chat_template": 5}, "chat_template must be a text, not '5'"),
    ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 5}]}, "must hold names and texts"),
    ("tokenizer_config.json", {"chat_template": [5]}, "holds something of a wrong type"),
    ("tokenizer_config.json", {"added_tokens_decoder": [5]}, r"added_tokens_decoder must be tokens by id, not \[5\]"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder must be tokens"),
    ("tokenizer_config.json", {"extra_special_tokens": "ab"}, "extra_special_tokens must be tokens, not 'ab'"),
    ("tokenizer_config.json", {"tokenizer_class": {"a": {}}}, "tokenizer_class must be a text"),
    ("tokenizer_config.json", {"split_special_tokens": "yes"}, "split_special_tokens must be true or false"),
    (
        "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True},
        "add_prefix_space=True, but tokenizer.json says False",
    ),
    ("tokenizer_config.json", {"added_tokens_decoder": {"999": {"content": "<b"}}}, "token '<b' has id 999 in"),
    ("added_tokens.json", {"<|im_end|>": 7}, r"token '<\|im_end\|>' has id 7 in .*, but 2 in tokenizer.json"),
]


@pytest.mark.parametrize(("name", "content", "message"), ODD_SETTINGS, ids=[message for *_, message in ODD_SETTINGS])
def test_settings_that_do_not_fit_the_tokenizer(
    checkpoint: Path, tmp_path: Path, name: str, content: object, message: str
) -> None:
    path = copy_with(checkpoint, tmp_path / "t")
    (path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2TokenizerFast", None])
def test_a_space_in_front_that_transformers_leaves_out(checkpoint: Path, tmp_path: Path, kind: str | None) -> None:
    path = copy_with(checkpoint, tmp_path / "t")
    file = json.loads((path / "tokenizer.json").read_text())
    file["pre_tokenizer"]["add_prefix_space"] = True
    (path / "tokenizer.json").write_text(json.dumps(file))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("add_prefix_space", None)
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": kind}))
    if kind is not None:
        with pytest.raises(ValueError, match=r"add_prefix_space=False, but tokenizer\.json says True"):
            Tokenizer.from_directory(path)
        return
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.encode("ab") == tokenizer.encode(" ab")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"]
)
def test_pipes_and_devices_are_not_read(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Nobody may ever write to a pipe, and a device may never end."""
    path = copy_with(checkpoint, tmp_path / "t")
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*no regular file"):
        Tokenizer.from_directory(path)
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*no regular file"):
        Tokenizer.from_directory(path)


def test_texts_that_the_library_fails_on_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """It calls half of a surrogate pair no text, and panics where a rule takes too many steps."""
    path = copy_with(checkpoint, tmp_path / "t")
    file = json.loads((path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    file["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, {**file["pre_tokenizer"], "use_regex": False}],
    }
    (path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.decode(tokenizer.encode("aaa b")) == "aaa b"
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text]), tokenizer.encode_with_starts):
        with pytest.raises(ValueError, match=r"cannot work on this text: .*retry-limit"):
            encode("a" * 40 + " b")
        with pytest.raises(ValueError, match=r"holds '\\ud800' at character 1, half of a surrogate pair"):
            encode("a\ud800")


TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "blocks": """
{%- set ns = namespace(count=0) %}
{%- for message in messages -%}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {% if loop.index0 > 5 %}{% break %}{% endif %}
    {{- ns.count }}: {{ message.content }}
    {% if message.tool_calls is defined %}calls{% endif %}
{% endfor -%}
{% if add_generation_prompt %}assistant:{% endif %}
""",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ dict(a=1) | tojson(separators=(',', ':')) }}",
    "tools": "{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}{{ enable_thinking | default('unset') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "undefined": "{{ nothing }}{{ pad_token }}{{ messages[0].nothing is none }}{{ date_string is defined }}",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS, "enable_thinking": False}])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_templates_equal_transformers(
    checkpoint: Path, tmp_path: Path, name: str, variables: dict, add_generation_prompt: bool
) -> None:
    path = copy_with(checkpoint, tmp_path / "t", chat_template=TEMPLATES[name])
    (path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = Tokenizer.from_directory(path)
    theirs = tokenizer.hf()
    for chat in CHATS:
        expected = theirs.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
        )
        assert tokenizer.chat_prompt(chat, add_generation_prompt, **variables) == expected


def test_the_jinja_file_wins_and_named_templates_are_chosen_by_tools(checkpoint: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    path = copy_with(checkpoint, tmp_path / "t", chat_template=named)
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.chat_prompt(CHATS[0]) == "plain"
    assert tokenizer.chat_prompt(CHATS[0], tools=TOOLS) == "with tools"
    (path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_directory(path).chat_prompt(CHATS[0]) == "from the file"


def test_a_missing_template_is_an_error_that_says_so(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(copy_with(checkpoint, tmp_path / "t", chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.chat_prompt(CHATS[0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "__x"),
        ("{{ namespace(_x=1) }}", "_x"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% for i in range(100000000) %}{% endfor %}", "too big"),
        ("{{ messages[0].content / 0 }}", "failed on the conversation"),
    ],
)
def test_templates_run_in_a_sandbox(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {}).render(CHATS[0])


def test_lists_that_the_library_shortens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'decoder/decoders' the library reads 1 parts, not 2"):
        _check_part(Path("tokenizer.json"), "decoder/", {"decoders": [{}, {}]}, {"decoders": [{}]})


LOOP = "{% for i in range(90000) %}"
HOSTILE = {
    "nested loops": LOOP * 4 + "{% endfor %}" * 4,
    "nested loops over one list": "{% set r = range(90000) %}"
    "{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
    "loops without a body": "{% set r = range(90000) %}"
    "{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** 100000000 }}",
    "power of a variable": "{% set x = messages | length * 10 %}{{ (x ** 100000000) % 7 }}",
    "repeated text": "{{ 'a' * 10 ** 9 }}",
    "repeated list": "{{ ([0] * 10 ** 9) | length }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "lists in lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "center as a method": "{{ 'a'.center(10 ** 10) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 10) }}",
    "width of a format": "{{ '%10000000000d' % 1 }}",
    "width of another format": "{{ '{:10000000000}'.format(1) }}",
    "bytes": "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "lipsum": "{{ lipsum(n=10 ** 8) }}",
    "lipsum in loops": LOOP + "{% set x = lipsum(n=100) %}{% endfor %}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list | length }}",
    "replace": "{% set a = 'a' * 10 ** 5 %}{{ a | replace('a', a) | length }}",
    "join": "{% set a = 'a' * 10 ** 5 %}{{ range(90000) | join(a) | length }}",
    "indented JSON": "{{ messages | tojson(indent=10 ** 10) }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "output": LOOP + "x" * 100 + "{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped_and_harm_only_their_own_process(name: str) -> None:
    """Each ends with one of the limits; compiling, which evaluates constants, has them as well."""
    limit = r"0\.2 s of processor time|512 MiB|too big|more than 4000000 characters|recursion|too large"
    with pytest.raises(ValueError, match=limit):
        ChatTemplate(HOSTILE[name], {}, RenderLimits(seconds=0.2)).render(CHATS[0])


def test_a_template_that_was_stopped_renders_the_next_conversation() -> None:
    source = "{% if messages[0].content == 'loop' %}" + HOSTILE["nested loops"] + "{% endif %}{{ messages[0].content }}"
    template = ChatTemplate(source, {}, RenderLimits(seconds=0.2))
    for _ in range(2):
        with pytest.raises(ValueError, match="processor time"):
            template.render([{"role": "user", "content": "loop"}])
        assert template.render([{"role": "user", "content": "hi"}]) == "hi"
    template.close()
    assert template.render([{"role": "user", "content": "again"}]) == "again"


def test_output_of_templates_is_limited() -> None:
    template = ChatTemplate(LOOP + "xxxx{% endfor %}", {}, RenderLimits(characters=10_000))
    with pytest.raises(ValueError, match="more than 10000 characters"):
        template.render(CHATS[0])


def test_templates_see_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMOE_SECRET", "x")
    template = ChatTemplate("{{ messages[0].content }}", {})
    environment = Path(f"/proc/{template._worker._process.pid}/environ").read_bytes()
    assert b"PYTHONPATH" in environment
    assert b"DYNAMOE_SECRET" not in environment


def test_nesting_is_limited_and_names_of_parameters_are_no_special_names() -> None:
    deep: list = []
    for _ in range(900):
        deep = [deep]
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(ValueError, match="documents is nested deeper than 64"):
        template.render(CHATS[0], documents=deep)
    with pytest.raises(ValueError, match="a chat message is nested deeper than 64"):
        template.render([{"role": "user", "content": "a", "tool_calls": deep}])
    with pytest.raises(ValueError, match=r"\['self'\] are not allowed"):
        template.render(CHATS[0], **{"self": 1})


def test_what_callers_may_pass_is_limited() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(ValueError, match=r"\['chat_template', 'messages_'\] are not allowed"):
        template.render(CHATS[0], chat_template="{{ 1 }}", messages_=[])
    with pytest.raises(ValueError, match="plain JSON values, not PosixPath"):
        template.render([{"role": "user", "content": Path("x")}])
    with pytest.raises(ValueError, match="must be a dict, not str"):
        template.render(["hello"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least one message"):
        template.render([])
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% if %}", {})
