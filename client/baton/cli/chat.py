"""``baton chat``."""

import contextlib
import sys
from typing import Annotated

import typer

from baton.cli import options as shared
from baton.cli import sampling_flags as flags
from baton.cli.conversation import Answer, Conversation
from baton.cli.outcome import exit_codes, one_line
from baton.client import Client
from baton.errors import BatonError
from baton.values import FinishReason

_PROMPT = "> "
_HELP = """\
/reset         forget the conversation
/system TEXT   set the system message; without TEXT: have none
/help          show this
/quit          leave, as Ctrl-D does
Ctrl-C         stop the answer
A line that begins with a space is never a command."""
EXAMPLES = shared.examples(
    "baton chat",
    "baton chat --system 'Answer in one line.' --temperature 0.7",
    "printf 'Write a function.\\nNow document it.\\n' | baton chat",
)


def chat(
    server: shared.ServerOption = shared.DEFAULT_SERVER,
    system: Annotated[str, typer.Option(help="The system message (default: none).", metavar="TEXT")] = "",
    max_tokens: flags.MaxTokens = 512,
    stop: flags.Stop = None,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    presence_penalty: flags.PresencePenalty = None,
    seed: flags.Seed = None,
    priority: flags.Priority = None,
) -> None:
    """Talk to a chat model.

    Every line is a message; /help lists the commands, Ctrl-C stops an answer,
    Ctrl-D leaves. If stdin is no terminal, its lines are the messages, and the
    first error ends it with exit code 1.
    """
    sampling = flags.given(
        {
            "max_tokens": max_tokens,
            "stop": stop,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "seed": seed,
            "priority": priority,
        }
    )
    with exit_codes(), Client(server) as client:
        model = client.model_info(timeout=shared.TIMEOUT_SECONDS)
        if not model.has_chat_template:
            raise BatonError(f"the checkpoint of {model.model} has no chat template; 'baton generate' continues texts")
        conversation = Conversation(client, model.max_total_tokens, sampling, system)
        if not sys.stdin.isatty():
            _talk(conversation)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # makes input() edit lines; some Pythons lack it
        _note(f"This is {model.model}. /help lists the commands, Ctrl-D leaves.")
        _talk_at_terminal(conversation)


def _talk(conversation: Conversation) -> None:
    while (line := sys.stdin.readline()) and _take(conversation, line.rstrip("\r\n")):
        pass


def _talk_at_terminal(conversation: Conversation) -> None:
    """Errors and Ctrl-C end an answer, not the session."""
    going = True
    while going:
        try:
            going = _take(conversation, _read())
        except EOFError:
            _note("")
            going = False
        except KeyboardInterrupt:
            _note("\nCtrl-D leaves.")
        except BatonError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)


def _read() -> str:
    """A line from the terminal; the prompt stays out of a stdout that is not one."""
    if sys.stdout.isatty():
        return input(_PROMPT)
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.rstrip("\n")


def _take(conversation: Conversation, line: str) -> bool:
    """Answers a message or obeys a command; whether to go on."""
    if not line.strip():
        return True
    if not line.startswith("/"):
        _answer(conversation, line)
        return True
    command, _, text = line.partition(" ")
    if command == "/reset":
        conversation.reset()
        _note("The conversation is forgotten.")
    elif command == "/system":
        conversation.system = text.strip()
        _note("The system message is set." if conversation.system else "There is no system message.")
    elif command == "/help":
        _note(_HELP)
    elif command != "/quit":
        _note(f"There is no {command}; /help lists the commands.")
    return command != "/quit"


def _answer(conversation: Conversation, message: str) -> None:
    answer = conversation.ask(message)
    try:
        with contextlib.closing(answer):
            for text in answer:
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(flush=True)  # the terminal has just printed ^C
    except BatonError:
        if answer.text:
            _end_line(answer)
        raise
    else:
        _end_line(answer)
    if sys.stdin.isatty() and sys.stderr.isatty():
        _note(_figures(answer))


def _end_line(answer: Answer) -> None:
    if not answer.text.endswith("\n"):
        print(flush=True)


def _figures(answer: Answer) -> str:
    parts = [f"{answer.tokens} token" + ("" if answer.tokens == 1 else "s")]
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.finish_reason is None:
        parts.append("stopped")
    elif answer.finish_reason is FinishReason.LENGTH:
        parts.append("cut off for length")
    return f"[{', '.join(parts)}]"


def _note(text: str) -> None:
    """What is no part of an answer goes to stderr."""
    print(text, file=sys.stderr, flush=True)
