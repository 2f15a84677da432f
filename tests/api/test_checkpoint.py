"""What is read of a checkpoint, compared with transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from scheduler_service.api.chat_template import ChatTemplate
from scheduler_service.api.checkpoint import Checkpoint, load_checkpoint
from scheduler_service.api.errors import RequestError
from scheduler_service.api.prompts import PromptEncoder
from scheduler_service.api.request import ChatMessage, ChatPrompt, TextPrompt

from .conftest import CHATML, write_checkpoint

MESSAGES = [("system", "be brief"), ("user", "<b>größer</b> & 'x' 🙂 <|im_end|>"), ("assistant", "ja\n"), ("user", "")]
TEMPLATES = {
    "chatml": CHATML,
    "special tokens, loop controls, helpers": """
        {{- bos_token }}
        {% for message in messages %}
            {% if loop.index > 3 %}{% break %}{% endif %}
            {%- set content = message.content | trim %}
            {{ message['role'] | upper }}: {{ content | tojson }}{{ {'a': [1, 'é<']} | tojson(indent=2) }}
        {% endfor %}
        {% if tools is none and documents is not defined or true %}none{% endif %}
        {{ eos_token }} {{ strftime_now('%Y') }}
        {% if add_generation_prompt %}{{ 'assistant' }}{% endif %}
    """,
    "generation block": """
        {%- set ns = namespace(found=false) %}
        {%- for message in messages %}
            {%- if message.role == 'assistant' %}
                {% generation %}{% set ns.found = true %}{{ message.content }}{% endgeneration %}
            {%- else %}
                {{- message.content }}
            {%- endif %}
        {%- endfor %}
        {{ ns.found }}
    """,
}


def chat(messages: list[tuple[str, str]], *, prompted: bool = True) -> ChatPrompt:
    return ChatPrompt(tuple(ChatMessage(role, content) for role, content in messages), prompted)


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_equals_transformers(name: str, prompted: bool, tmp_path: Path) -> None:
    tokens = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}}
    folder = write_checkpoint(tmp_path, chat_template=TEMPLATES[name], **tokens)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        [{"role": role, "content": content} for role, content in MESSAGES],
        add_generation_prompt=prompted,
        return_dict=False,
    )
    assert encoder(load_checkpoint(folder)).encode(chat(MESSAGES, prompted=prompted), 10_000).tolist() == theirs


def encoder(checkpoint: Checkpoint) -> PromptEncoder:
    return PromptEncoder(checkpoint.tokenizer, checkpoint.chat_template)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[PromptEncoder, Any]:
    """Ours and transformers', of a tokenizer that adds tokens and would truncate and pad."""
    folder = write_checkpoint(tmp_path_factory.mktemp("both"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    return encoder(load_checkpoint(folder)), PreTrainedTokenizerFast.from_pretrained(folder)


@settings(deadline=None, max_examples=100)
@given(st.text(min_size=1, max_size=100))
def test_text_equals_transformers(both: tuple[PromptEncoder, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode(TextPrompt(text), 0).tolist() == theirs(text)["input_ids"]


def test_template_sources(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]
    folder = write_checkpoint(tmp_path, chat_template=named)
    assert rendered(folder) == "listed"
    (folder / "chat_template.jinja").write_text("file")
    assert rendered(folder) == "file"
    (folder / "chat_template.jinja").write_text("{% broken")
    assert load_checkpoint(folder).chat_template is None


def rendered(folder: Path) -> str:
    template = load_checkpoint(folder).chat_template
    assert template is not None
    return template.render(chat(MESSAGES), 100)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.missing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(100000) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}",
    ],
)
def test_template_errors_name_chat(source: str) -> None:
    with pytest.raises(RequestError) as error:
        ChatTemplate(source, {}).render(chat(MESSAGES), 10_000)
    assert error.value.field == "chat"


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    assert load_checkpoint(folder).eos_token_ids == (2, 0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    assert load_checkpoint(folder).eos_token_ids == (1,)
    (folder / "generation_config.json").unlink()
    assert load_checkpoint(folder).eos_token_ids == (0,)
    (folder / "config.json").unlink()
    assert load_checkpoint(folder).eos_token_ids == (2,)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_checkpoint(tmp_path)
