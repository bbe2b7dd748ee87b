"""The commands that need no Trainer: ``export``, ``generate`` and ``compare``, each a function with typed arguments."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf_lightning.config_errors import OneLineErrors, refusal_of_constructor
from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_lightning.rollout.sampler import SamplingConfig

FUNCTIONS = {
    "compare": "rlhf_lightning.evaluation.compare:compare",
    "export": "rlhf_lightning.commands:export",
    "generate": "rlhf_lightning.commands:generate",
}


def function_parser(command: str) -> tuple[OneLineErrors, Callable[..., Any]]:
    """Return the parser of a command, made from its function's signature and docstring, and the function."""
    module, _, name = FUNCTIONS[command].partition(":")
    function = getattr(import_module(module), name)
    import_module("rlhf_lightning.rollout.reward_model")  # short names are looked up among what is imported
    parser = OneLineErrors(prog=f"rlhf-lightning {command}", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file with any of the keys below.")
    parser.add_function_arguments(function, fail_untyped=False)
    return parser, function


def check_function_command(command: str, argv: list[str]) -> dict[str, Any]:
    """Check the arguments of ``export``, ``generate`` or ``compare`` without doing anything.

    Returns:
        The arguments.

    Raises:
        UserError: If a constructor refuses its arguments.
        SystemExit: With status 2 after one line on stderr, where something in them is wrong.
    """
    return _parsed(function_parser(command)[0], argv)


def run_function_command(command: str, argv: list[str]) -> Any:
    """Run ``export``, ``generate`` or ``compare`` with the command line's arguments; return what its function returns.

    Raises:
        UserError: If something that the user gave cannot work.
        SystemExit: From the parser, with status 2 after a wrong argument.
    """
    parser, function = function_parser(command)
    result = function(**_parsed(parser, argv))
    if command == "compare":
        print(f"{result['table']}\nreport: {result['report']}\nmarkdown: {result['markdown']}")
    return result


def _parsed(parser: OneLineErrors, argv: list[str]) -> dict[str, Any]:
    try:
        arguments = parser.instantiate(parser.parse_args(argv))
    except (ValueError, TypeError) as failure:
        refusal = refusal_of_constructor(failure)
        if refusal is None:
            raise
        raise UserError(str(refusal)) from failure
    return {key: value for key, value in vars(arguments).items() if key != "config"}


def export(
    ckpt: str,
    output: str,
    report: str | None = None,
    report_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Write the trained model of a checkpoint as a Hugging Face folder with a model card.

    The card, ``README.md``, is made of what the run has recorded: its config, logs and samples, and a comparison that
    measured the model.

    Args:
        ckpt: Checkpoint of a run, such as ``runs/ppo-1/checkpoints/last.ckpt``.
        output: Folder to write: weights (safetensors), config, tokenizer, chat template, card. It must not hold files
            yet.
        report: Folder that ``compare`` has written, whose results the card shows; ``null`` takes the newest beside the
            run's folder that measured these weights, if there is one.
        report_model: What that comparison calls the model; ``null`` finds the one of the same weights.
        push_to_hub: Repository to upload the folder to, as ``owner/name`` or ``name``; it is made if there is none. The
            token is the one that huggingface_hub finds (``hf auth login`` or ``HF_TOKEN``). ``null`` uploads nothing.
        private: Make a new repository private.

    Raises:
        UserError: If the checkpoint, the report or the repository is not what it should be.
    """
    from rlhf_lightning.hub import check_repository, push_folder
    from rlhf_lightning.model_card.export import export_with_card

    if report_model is not None and report is None:
        raise UserError("report_model names a model of a report; give --report FOLDER with it.")
    if private and push_to_hub is None:
        raise UserError("private is for a repository that is pushed to; give --push_to_hub OWNER/NAME with it.")
    if push_to_hub is not None:
        check_repository(push_to_hub)
    folder = export_with_card(ckpt, output, report=report, report_model=report_model, repository=push_to_hub)
    print(f"model written to {folder}")
    if push_to_hub is not None:
        print(f"uploaded to {push_folder(folder, push_to_hub, private=private)}")


def generate(
    model: str,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    samples: int = 1,
    chat: bool | None = None,
    stop_tokens: list[str] | None = None,
    stop_strings: list[str] | None = None,
) -> None:
    """Answer a prompt, or every line that is typed in.

    Args:
        model: Hugging Face folder or hub name, such as ``runs/ppo-1/model``.
        prompt: What to answer; left out, prompts are read line by line until an empty one or the end of input.
        max_new_tokens: Longest answer in tokens; it ends sooner where the model can read no further.
        temperature: Divides the logits: below 1 more of the likely, above 1 more of the unlikely; 0 takes the
            likeliest token.
        top_k: Draw from the k likeliest tokens; 0 is off.
        top_p: Draw from the smallest set of tokens whose probability reaches this share; 1 is off.
        seed: The same seed, prompt and settings give the same answer.
        samples: Answers to each prompt.
        chat: Put the prompt into the model's chat template; ``null`` does so where it has one.
        stop_tokens: Tokens that end an answer, as text; ``null`` takes the tokenizer's end of text.
        stop_strings: Texts that end an answer too, such as ``Question:``; ``null`` is off.
    """
    from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
    from rlhf_lightning.rollout.sampler import SamplingConfig

    config = SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
    )
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1.")
    tokenizer = load_tokenizer(model)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    answer = _answerer(load_causal_lm(model), tokenizer, config, chat=chat)
    for number, text in enumerate(_prompts(prompt)):
        for response in answer(text, samples, seed + number):
            print(without_controls(response) if sys.stdout.isatty() else response, flush=True)


def without_controls(text: str) -> str:
    r"""Spell out what a terminal would obey: a model can say what moves the cursor, renames a window or types.

    Example:
        >>> without_controls("red: " + chr(27) + "[31m" + chr(10) + "over")
        'red: \\x1b[31m\nover'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _answerer(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: "SamplingConfig", *, chat: bool
) -> Callable[[str, int, int], list[str]]:
    """Return a function that answers a prompt some number of times."""
    import torch

    from rlhf_lightning.data.chat import ConversationEncoder
    from rlhf_lightning.models.loading import context_length
    from rlhf_lightning.rollout.decoding import CachedSampler
    from rlhf_lightning.rollout.sampler import resolve_stop_ids
    from rlhf_lightning.rollout.stop_strings import resolve_stop_strings

    stop_ids = resolve_stop_ids(tokenizer, config.stop_tokens)
    stop_strings = resolve_stop_strings(tokenizer, config.stop_strings)
    stop_token = config.stop_tokens[0] if config.stop_tokens else None
    encoder = ConversationEncoder(tokenizer, stop_token=stop_token, chat=chat)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampler, limit = CachedSampler(), context_length(model.config)
    sampler.setup(model.to(device).eval())

    def answer(prompt: str, samples: int, seed: int) -> list[str]:
        ids = torch.tensor([encoder.encode_prompt(prompt)] * samples, device=device)
        room = config.max_new_tokens if limit is None else limit - ids.shape[1]
        if room < 1:
            raise UserError(f"the prompt has {ids.shape[1]} tokens, but the model reads {limit}; give a shorter one.")
        within = replace(config, max_new_tokens=min(config.max_new_tokens, room))
        with torch.inference_mode():
            drawn = sampler.sample(
                ids,
                torch.ones_like(ids).bool(),
                config=within,
                stop_ids=stop_ids,
                stop_strings=stop_strings,
                seed=seed,
            )
        rows = zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
        return [tokenizer.decode(row[:length], skip_special_tokens=True).strip() for row, length in rows]

    return answer


def _prompts(prompt: str | None) -> Iterator[str]:
    """Yield the given prompt, or what is typed in until an empty line or the end of input."""
    if prompt is not None:
        yield prompt
        return
    invitation = "> " if os.isatty(0) else ""
    while True:
        try:
            line = input(invitation)
        except EOFError:
            return
        if not line.strip():
            return
        yield line
