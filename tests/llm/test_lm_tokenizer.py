"""Tokenizers, beside the packages that made their formats."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from emfuse_jax.llm import ByteTokenizer, Tokenizer, load_tokenizer
from emfuse_jax.llm.tokenizer import END_OF_TEXT, HfTokenizer, find_tokenizer

BYTES = ByteTokenizer()
TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
    {%- generation %}
    {{- '<|' + message.role + '|>' + message.content | trim }}
    {%- endgeneration %}
    {{- eos_token }}
{% endfor %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Why is <b>é</b> bold?"},
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A folder with a byte-level BPE whose special tokens and template are all set."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        ["the cat sat on the mat, the hat on the cat"] * 3, trainer
    )
    made.add_special_tokens(["<|user|>", "<|assistant|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made.enable_truncation(4)
    folder = tmp_path_factory.mktemp("bpe")
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def reference(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@hypothesis.given(st.text())
def test_bytes_are_utf8(text):
    ids = BYTES.encode(text)
    assert bytes(ids) == text.encode()
    assert BYTES.decode(ids) == text
    assert BYTES.encode(text, special=True) == [256, *ids]
    assert BYTES.decode([256, *ids, 256, 300]) == text
    assert BYTES.decode([*ids, 256], special=True) == text + END_OF_TEXT


def test_bytes_are_a_byte_level_bpe_to_others(tmp_path):
    """The file written is read by ``tokenizers`` as the same map, damaged UTF-8 included."""
    tokenizers = pytest.importorskip("tokenizers")
    BYTES.save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    assert [other.id_to_token(i) for i in range(257)] == BYTES.vocab()

    @hypothesis.given(st.text(), st.lists(st.integers(0, 256)))
    def agree(text, ids):
        assert other.encode(text, add_special_tokens=False).ids == BYTES.encode(text)
        assert other.encode(text).ids == BYTES.encode(text, special=True)
        assert other.decode(ids) == BYTES.decode(ids)

    agree()
    wrapped = HfTokenizer(other, {"eos_token": END_OF_TEXT})
    assert wrapped.vocab() == BYTES.vocab()
    assert (wrapped.eos_id, wrapped.bos_id, wrapped.vocab_size) == (256, None, 257)
    theirs = reference(tmp_path)
    assert theirs("hé").input_ids == BYTES.encode("hé", special=True)
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == 256


def test_hugging_face_files_are_read_as_transformers_reads_them(bpe, tmp_path):
    ours, theirs = load_tokenizer(bpe), reference(bpe)
    assert isinstance(ours, Tokenizer)
    assert isinstance(BYTES, Tokenizer)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, None)
    for text in ("the cat sat</s> on the hat", " naïve  日本 ", ""):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=True) == theirs(text).input_ids
        assert ours.decode(ids, special=True) == text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert len(ours.encode("the cat sat on the mat, the hat")) > 4  # not cut
    vocab = ours.vocab()
    assert len(vocab) == ours.vocab_size == len(theirs)
    assert vocab == theirs.convert_ids_to_tokens(range(len(vocab)))
    assert ours.decode([*ours.encode("cat"), 10_000]) == "cat"
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.vocab() == vocab
    assert again.chat(MESSAGES) == ours.chat(MESSAGES)
    assert reference(tmp_path)("the cat").input_ids == theirs("the cat").input_ids


def test_chats_are_rendered_as_transformers_renders_them(bpe):
    ours, theirs = load_tokenizer(bpe), reference(bpe)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            MESSAGES, add_generation_prompt=prompt, return_dict=False
        )
        assert ours.chat(MESSAGES, add_generation_prompt=prompt) == expected
    text = ours.decode(ours.chat(MESSAGES), special=True)
    assert text.startswith("<|system|>Be brief.</s>")
    assert text.endswith("<b>é</b> bold?</s>\n<|assistant|>")
    with pytest.raises(ValueError, match="no tools here"):
        ours.chat([{"role": "tool", "content": "1"}])
    with pytest.raises(ValueError, match="expected a dict with a role"):
        ours.chat([{"content": "1"}])
    with pytest.raises(ValueError, match="has no chat template"):
        BYTES.chat(MESSAGES)


def test_templates_are_kept_in_the_sandbox(bpe):
    made = load_tokenizer(bpe)
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% unknown %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 6) %}{% endfor %}",
        "{{ 'x'.encode('utf-99') }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ ('x' * 1800000000) | length }}",
        "{{ (2 * [1] * 1800000000) | length }}",
        "{{ 9 ** (9 ** 9) }}",
    ):
        tokenizer = HfTokenizer(made._tokenizer, {"chat_template": template})
        with pytest.raises(ValueError, match="the chat template cannot render this"):
            tokenizer.chat(MESSAGES)
    for nothing in ([], ["cat"], [{"name": "default"}], [{"template": "cat"}], 7):
        tokenizer = HfTokenizer(made._tokenizer, {"chat_template": nothing})
        with pytest.raises(ValueError, match="has no chat template"):
            tokenizer.chat(MESSAGES)
    several = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": "cat"},
    ]
    tokenizer = HfTokenizer(made._tokenizer, {"chat_template": several})
    assert tokenizer.decode(tokenizer.chat(MESSAGES)) == "cat"


def test_damaged_and_missing_files_are_named(bpe, tmp_path):
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ValueError, match="eos_token='<end>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list"):
        load_tokenizer(tmp_path)
