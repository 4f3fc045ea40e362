"""A gateway process over a stub, for tests that kill it: prints its port, then serves until it is killed.

python -m tests.edge.stub_gateway STEP_S
"""

from __future__ import annotations

import asyncio
import sys

from tests.edge.fakes import LIMITS, served

from moestro.cluster.edge.core import RequestCore
from moestro.cluster.edge.grpc_server import GrpcOptions, GrpcServer
from moestro.cluster.edge.stub import StubBackend, StubCluster


async def main(step_s: float) -> None:
    core = RequestCore([served(StubBackend(LIMITS, step_s))])
    server = GrpcServer(core, StubCluster(), "test", GrpcOptions(host="127.0.0.1", port=0))
    print(await server.start(), flush=True)
    await server.wait()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
