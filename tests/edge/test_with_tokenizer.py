"""The edge with the real text side: a byte-level BPE tokenizer made here, multi-byte characters and stop strings."""

from __future__ import annotations

import json

import pytest
from tests.edge.serving import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.served import ServedModel
from moestro.cluster.edge.stub import StubBackend, stub_token
from moestro.cluster.text.model import TextModel
from moestro.cluster.text.stream import TextStream
from moestro.protos.errors import InvalidRequest
from moestro.protos.gen import inference_pb2 as pb
from moestro.protos.sequences import EngineLimits, FinishReason, SequenceDelta, SequenceRequest

TEXT = "def naïve(x):\n    return '🙂' * x  # ünïcode\nEND of it\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.5}))
    return TextModel.load(folder)


class Scripted(StubBackend):
    """Says the given tokens, one a step, whatever the prompt."""

    def __init__(self, model: TextModel, tokens: list[int]) -> None:
        super().__init__(EngineLimits(model.vocab_size, max_context=4096, max_waiting=8))
        self.tokens = tokens

    def start(self, sequences: list[SequenceRequest]) -> ScriptedStream:  # type: ignore[override]
        return ScriptedStream(self.tokens, sequences[0])


class ScriptedStream:
    def __init__(self, tokens: list[int], sequence: SequenceRequest) -> None:
        self.left = list(tokens)[len(sequence.output_ids) :]
        self.sequence = sequence
        self.cancelled = False

    async def next(self) -> list[SequenceDelta]:
        assert not self.cancelled
        token = self.left.pop(0)
        eos = token in self.sequence.sampling.eos_token_ids
        return [SequenceDelta(self.sequence.sequence_id, (token,), finish_reason=FinishReason.EOS if eos else None)]

    def cancel(self, sequence_id: str) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.cancelled = True


def serve(model: TextModel, backend: StubBackend) -> RequestCore:
    return RequestCore([ServedModel(model, backend, lambda prompt, stops: TextStream(model, prompt, stops))])


def test_text_is_whole_characters_and_ends_before_the_stop_string(model: TextModel) -> None:
    tokens = [*model.encode(TEXT), 0]

    async def test() -> None:
        core = serve(model, Scripted(model, tokens))
        events = [event async for event in core.stream(pb.GenerateRequest(text="x"))]
        assert "".join(event.text for event in events) == TEXT
        assert all("\ufffd" not in event.text for event in events)
        assert [t for e in events for t in e.deltas[0].token_ids] == tokens
        assert events[-1].deltas[0].finish_reason is FinishReason.EOS
        stopped = await core.complete(pb.GenerateRequest(text="x", stop=pb.StopParams(strings=["END", "nowhere"])))
        assert stopped.text == TEXT.partition("END")[0]
        assert (stopped.finish_reason, stopped.choices[0].stop_string) == (FinishReason.STOP_STRING, "END")
        used = stopped.choices[0].token_ids
        assert used == tuple(tokens[: len(used)])
        assert "END" in model.decode(used)
        assert "END" not in model.decode(used[:-1])

    run(test())


def test_prompt_defaults_and_random_tokens(model: TextModel) -> None:
    async def test() -> None:
        backend = StubBackend(EngineLimits(model.vocab_size, max_context=4096, max_waiting=8))
        core = serve(model, backend)
        sent = pb.GenerateRequest(text=TEXT, stop=pb.StopParams(max_tokens=300, ignore_eos=True))
        with await core.open(sent) as stream:
            assert stream.journal.admitted.prompt_ids == tuple(model.encode(TEXT))
            assert stream.journal.admitted.sampling[0].temperature == 0.5
            sequence = stream.journal.sequences()[0]
            text = "".join([event.text async for event in stream])
        ids = [stub_token(sequence, i, model.vocab_size) for i in range(300)]
        assert text == model.decode([*sequence.prompt_ids, *ids])[len(TEXT) :]
        with pytest.raises(InvalidRequest, match="no chat template"):
            await core.open(pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hi")]))

    run(test())


def test_cut_off_anywhere_and_resumed_the_characters_are_the_same(model: TextModel) -> None:
    tokens = [*model.encode(TEXT), 0]

    async def test() -> None:
        for stops in ([], ["END"], ["x", "return '🙂' +"]):
            request = pb.GenerateRequest(text="x", request_id="r", stop=pb.StopParams(strings=stops))
            core = serve(model, Scripted(model, tokens))
            whole = [event async for event in core.stream(request)]
            for cut in range(len(whole)):
                arrived = [token for event in whole[:cut] for token in event.deltas[0].token_ids]
                choices = [pb.ResumedChoice(token_ids=arrived)] if cut else []
                number = whole[cut - 1].sequence_number if cut else None
                resume = pb.Resume(last_sequence_number=number, choices=choices)
                again = pb.GenerateRequest(text="x", request_id="r", stop=request.stop, resume=resume)
                rest = [event async for event in core.stream(again)]
                assert [event._replace(usage=None) for event in rest] == [e._replace(usage=None) for e in whole[cut:]]

    run(test())
