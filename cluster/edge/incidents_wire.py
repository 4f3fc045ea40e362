"""Incidents to public messages."""

from __future__ import annotations

from moestro.cluster.edge.incidents import Incident
from moestro.protos.gen import inference_pb2 as pb


def encode_incident(incident: Incident, now_s: float) -> pb.Incident:
    """``now_s`` is of the edge's clock."""
    params = incident.sampling
    return pb.Incident(
        name=incident.name,
        age_seconds=now_s - incident.at_s,
        request_id=incident.request_id,
        model=incident.model,
        digest=incident.digest,
        prompt_tokens=incident.num_prompt_tokens,
        output_tokens=incident.num_output_tokens,
        sampling=pb.SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=params.seed,
        ),
        max_tokens=params.max_tokens,
        deaths=[
            pb.Death(rank=death.engine, reason=death.reason, age_seconds=now_s - death.at_s)
            for death in incident.deaths
        ],
    )
