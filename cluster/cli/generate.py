"""``moestro generate`` and ``moestro chat``: text in the terminal, from a cluster or from this process alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moestro.cluster.cli.sources import Ask, cluster_source, local_source
from moestro.protos.gen import inference_pb2 as pb

Address = Annotated[str, typer.Option(help="host:port of a running cluster.")]
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
    request = pb.GenerateRequest(text=text, sampling=_sampling(temperature, top_p, seed), stop=_stop(max_tokens, stop))
    _run(_source(local, model, address), lambda ask: _print(ask(request)))


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
    history = [pb.ChatMessage(role="system", content=system)] if system else []
    console = Console()

    async def converse(ask: Ask) -> None:
        while line := await asyncio.to_thread(_read_line, console):
            history.append(pb.ChatMessage(role="user", content=line))
            request = pb.ChatRequest(
                messages=history, sampling=_sampling(temperature, top_p, seed), stop=_stop(max_tokens, stop)
            )
            history.append(pb.ChatMessage(role="assistant", content=await _print(ask(request))))

    _run(_source(local, model, address), converse)


def _source(local: bool, model: Path | None, address: str) -> AbstractAsyncContextManager[Ask]:
    if model is not None and not local:
        raise typer.BadParameter(
            "goes with --local; a cluster serves the model it was started with", param_hint="--model"
        )
    return local_source(model) if local else cluster_source(address)


def _run(source: AbstractAsyncContextManager[Ask], work: Callable[[Ask], Awaitable[object]]) -> None:
    async def main() -> None:
        async with source as ask:
            await work(ask)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


async def _print(pieces: AsyncIterator[str]) -> str:
    """Writes the pieces as they come, and returns them joined."""
    text = []
    async for piece in pieces:
        text.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(text)


def _read_line(console: Console) -> str:
    try:
        return console.input("[bold cyan]you>[/] ").strip()
    except EOFError:
        return ""


def _sampling(temperature: float | None, top_p: float | None, seed: int | None) -> pb.SamplingParams:
    return pb.SamplingParams(temperature=temperature, top_p=top_p, seed=seed)


def _stop(max_tokens: int, strings: list[str] | None) -> pb.StopParams:
    return pb.StopParams(max_tokens=max_tokens, strings=strings or ())
