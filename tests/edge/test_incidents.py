"""What an operator sees of quarantined requests: over the wire, and on the command line."""

from __future__ import annotations

import json

import pytest
from tests.edge.fakes import LIMITS
from tests.edge.test_client import serving
from tests.edge.test_migration import kills_at
from typer.testing import CliRunner

from moestro.cluster.cli.main import app
from moestro.cluster.client import Client
from moestro.cluster.edge.admitted import Admitted
from moestro.cluster.edge.incidents import Death, Incidents
from moestro.cluster.edge.stub import StubBackend
from moestro.protos.errors import InvalidRequest, Quarantined
from moestro.protos.sequences import SamplingParams


def test_a_quarantined_request_is_found_by_the_id_in_its_error() -> None:
    backend = StubBackend(LIMITS, poison=kills_at(2, "bad"))
    with serving(backend) as (address, _), Client(address) as client:
        assert client.incidents() == ()
        with pytest.raises(Quarantined) as caught:
            client.generate("bad", max_tokens=9, temperature=0.5, seed=3, request_id="mine")
        (incident,) = client.incidents(caught.value.incident)
        assert [each.name for each in client.incidents()] == [incident.name]
        assert (incident.request_id, incident.model, incident.prompt_tokens) == ("mine", "fake", 3)
        assert (incident.output_tokens, incident.max_tokens, incident.seed) == ((2,), 9, 3)
        assert incident.sampling["temperature"] == 0.5
        assert [death.rank for death in incident.deaths] == ["stub 1", "stub 2"]
        assert 0 <= incident.deaths[1].age_s <= incident.deaths[0].age_s < 60
        with pytest.raises(InvalidRequest, match="keeps no incident 'nope'"):
            client.incidents("nope")

        shown = CliRunner().invoke(app, ["incidents", "--address", address], env={"COLUMNS": "200"}).output
        assert incident.name in shown
        assert "stub 1, stub 2" in shown
        one = CliRunner().invoke(app, ["incidents", incident.name, "--address", address]).output
        assert "temperature 0.5" in one
        assert incident.digest in one
        listed = json.loads(CliRunner().invoke(app, ["incidents", "--json", "--address", address]).output)
        assert [each["request_id"] for each in listed] == ["mine"]


def test_records_are_bounded_and_the_digest_tells_requests_apart() -> None:
    def admitted(request_id: str, seed: int) -> Admitted:
        return Admitted(request_id, "m", (1, 2), (SamplingParams(seed=seed, logit_bias={2: 1.0, 1: 0.5}),), seed)

    records = Incidents(capacity=2)
    for number in range(4):
        records.add(admitted(f"r{number}", number % 2), (0,), (Death("a", "gone", 1.0), Death("b", "gone", 2.0)))
    assert [record.request_id for record in records.latest()] == ["r3", "r2"]
    assert records.of_request("r1") is None
    assert records.latest()[0].at_s == 2.0
    assert len({admitted(f"r{seed}", seed).digest for seed in range(5)}) == 5
    assert admitted("x", 1).digest == admitted("y", 1).digest
