"""``moestro generate`` and ``moestro chat``: text in the terminal, from a cluster or from this process alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moestro.cluster.cli.sources import Source, open_source
from moestro.cluster.client_calls import Options
from moestro.cluster.edge.events import StreamEvent

Address = Annotated[str, typer.Option(help="host:port of a gateway; several, with commas, are tried in turn.")]
Local = Annotated[bool, typer.Option("--local", help="No cluster: run the model in this process.")]
Model = Annotated[Path | None, typer.Option(help="With --local: checkpoint folder. Left out: the bundled demo.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Output tokens at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Left out: the checkpoint's own.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Nucleus sampling, (0, 1].")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop at this string; may be given several times.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    address: Address = "localhost:50051",
    local: Local = False,
    model: Model = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Continues PROMPT, streaming the text to the terminal."""
    text = sys.stdin.read() if prompt == "-" else prompt
    options = _options(max_tokens, temperature, top_p, seed, stop)

    async def work(source: Source) -> None:
        await _print(source.stream(text, **options))

    _run(work, address, local, model)


def chat(
    address: Address = "localhost:50051",
    local: Local = False,
    model: Model = None,
    system: Annotated[str, typer.Option(help="A system message to begin with.")] = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """A conversation by the checkpoint's chat template. An empty line or Ctrl-D ends it."""
    messages = [{"role": "system", "content": system}] if system else []
    options = _options(max_tokens, temperature, top_p, seed, stop)
    console = Console()

    async def converse(source: Source) -> None:
        while line := await asyncio.to_thread(_read_line, console):
            messages.append({"role": "user", "content": line})
            answer = await _print(source.stream_chat(messages, **options))
            messages.append({"role": "assistant", "content": answer})

    _run(converse, address, local, model)


def _run(work: Callable[[Source], Awaitable[None]], address: str, local: bool, model: Path | None) -> None:
    if model is not None and not local:
        raise typer.BadParameter(
            "goes with --local; a cluster serves the model it was started with", param_hint="--model"
        )

    async def main() -> None:
        async with open_source(address, local, model) as source:
            await work(source)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


async def _print(events: AsyncIterator[StreamEvent]) -> str:
    """Writes the text as it comes, and returns it whole."""
    pieces = []
    async for event in events:
        pieces.append(event.text)
        sys.stdout.write(event.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(pieces)


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold cyan]you>[/] ").strip()
    except EOFError:
        return ""


def _options(
    max_tokens: int, temperature: float | None, top_p: float | None, seed: int | None, stop: list[str] | None
) -> Options:
    options: Options = {"max_tokens": max_tokens, "stop": stop or ()}
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if seed is not None:
        options["seed"] = seed
    return options
