"""``kb-client enroll``: a few seconds of a voice to a speaker embedding under a name."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.device_client import speakers
from knowledge_boosting.device_client.audio import devices
from knowledge_boosting.device_client.audio.files import read_speech
from knowledge_boosting.device_client.hints.local_server import local_server
from knowledge_boosting.device_client.hints.stream import enroll
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.protos.codec import ENROLLMENT_SECONDS

SHORTEST = 5.0  # seconds; less tells too little of a voice
LONGEST = ENROLLMENT_SECONDS[1]


def enroll_speaker(
    name: str,
    speech_file: Path | None,
    *,
    server: str | None,
    credentials: Credentials,
    bundle: str,
    source: str | None,
    seconds: float,
) -> None:
    """Keep the voice of a file, or of an input device, under a name.

    Args:
        server: that makes the embedding; None: one that is started here, with ``bundle``.
        credentials: that it wants.
        source: input device, where there is no file.
        seconds: to record.

    Raises:
        InputError: the name, the file, the device or the speech cannot be used.
        Failure: the server does not start.
    """
    speakers.check_name(name, speech_file)
    opened = Bundle(bundle)
    if speech_file is not None:
        speech = read_speech(speech_file, SHORTEST)
    else:
        print(f"recording {seconds:g} s: speak now, alone", flush=True)
        speech = devices.record_speech(source, seconds)
        if not np.any(speech):
            raise InputError("the microphone gave only silence; is it muted?")
    with ExitStack() as stack:
        embedding = enroll(server or stack.enter_context(local_server(opened.directory)), speech, credentials)
    print(f"{name}: kept in {speakers.save(name, embedding)}; use it with kb-client live --speaker {name}")
