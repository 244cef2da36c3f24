"""A device in a separate process, for tests that kill it. Its arguments are ADDRESS and BUNDLE.

It prints the id of its session after the first hint, and streams until it is killed.
"""

import queue
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from knowledge_boosting.models.manifest import read_manifest
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import PROTOCOL_VERSION
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub


def stream(address: str, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    model = manifest.model
    received_frames: queue.SimpleQueue[int] = queue.SimpleQueue()

    def requests() -> Iterator[pb.StreamHintsRequest]:
        yield pb.StreamHintsRequest(
            config=pb.SessionConfig(
                protocol_version=PROTOCOL_VERSION,
                bundle_id=manifest.id,
                sample_rate=model.framing.sample_rate,
                pcm_encoding=pb.PCM_ENCODING_S16LE,
                hint_encoding=pb.HINT_ENCODING_F16LE,
            )
        )
        frame, length = 0, model.framing.n_fft
        while True:
            pcm = bytes(2 * model.microphones * length)
            yield pb.StreamHintsRequest(audio=pb.AudioChunk(first_frame=frame, pcm=pcm))
            frame, length = received_frames.get() + 1, model.framing.chunk

    with grpc.insecure_channel(address) as channel:
        responses = HintServiceStub(channel).StreamHints(requests())
        session = next(responses).started.session_id
        for response in responses:
            if response.hint.frame == 0:
                print(session, flush=True)
            received_frames.put(response.hint.frame)


if __name__ == "__main__":
    stream(sys.argv[1], Path(sys.argv[2]))
