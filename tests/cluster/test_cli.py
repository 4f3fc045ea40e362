"""The command line as it is frozen: commands, options, and text in the terminal without a cluster."""

from __future__ import annotations

from pathlib import Path

import typer
from tests.cluster.servers import run

from moestro import __version__
from moestro.cluster.cli.main import app

SERVE_OPTIONS = {
    "model", "--name", "--dp", "--tp", "--groups", "--gateways", "--host", "--port", "--device", "--ray-address",
    "--config",
}  # fmt: skip
GENERATE_OPTIONS = {
    "prompt", "--address", "--local", "--model", "--max-tokens", "--temperature", "--top-p", "--seed", "--stop",
}  # fmt: skip


def options_of(command: str) -> set[str]:
    group = typer.main.get_command(app)
    parameters = group.commands[command].params  # type: ignore[attr-defined]
    return {parameter.opts[0] for parameter in parameters}


def test_commands_and_options_are_these() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    expected = {"serve", "generate", "chat", "status", "experts", "bench", "verify", "config", "version"}
    expected |= {"scale", "update", "incidents"}
    assert set(commands) == expected
    assert options_of("serve") == SERVE_OPTIONS
    assert options_of("generate") == GENERATE_OPTIONS
    assert options_of("chat") == GENERATE_OPTIONS - {"prompt"} | {"--system"}
    assert options_of("experts") == {"--address", "--group", "--layer", "--decisions", "--json", "--png"}
    assert options_of("status") == {"--address", "--json"}
    assert options_of("verify") == {
        "--address", "--model", "--requests", "--seed", "--perturbation", "--timeout", "--json",
    }  # fmt: skip


def test_every_option_has_a_help_text() -> None:
    for name in ("serve", "generate", "chat", "status", "experts", "verify", "config"):
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_version_and_usage_errors(tmp_path: Path) -> None:
    assert run(tmp_path, "version").stdout == f"{__version__}\n"
    unknown = run(tmp_path, "serve", "--no-such-option")
    assert unknown.returncode == 2
    assert "Traceback" not in unknown.stderr


def test_local_text_is_seeded_and_needs_no_cluster(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--local", "--model", checkpoint, "--max-tokens", 8, "--seed", 4)
    one, again = (run(tmp_path, "generate", "-", *arguments, stdin="def f(") for _ in range(2))
    assert (one.returncode, one.stderr) == (0, "")
    assert one.stdout == again.stdout
    chat = run(tmp_path, "chat", *arguments, "--system", "brief", stdin="hello\nmore\n\n")
    assert (chat.returncode, chat.stderr) == (0, "")
    assert chat.stdout.count("you>") == 3
