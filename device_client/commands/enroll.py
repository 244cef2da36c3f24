"""``kb-client enroll``: store the speaker embedding of a few seconds of speech under a name."""

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

MIN_SECONDS = 5.0  # shorter speech gives a poor embedding
MAX_SECONDS = ENROLLMENT_SECONDS[1]


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
    """Enroll a speaker from a file or from an input device.

    Args:
        name: The name of the speaker.
        speech_file: A file with the speech. None: the speech is recorded.
        server: The server that computes the embedding. None: a local server is started with ``bundle``.
        credentials: The credentials for the server.
        bundle: The name or path of a bundle for the local server.
        source: The input device for the recording. None: the default device.
        seconds: The duration of the recording.

    Raises:
        InputError: The name, the file, the device or the speech cannot be used.
        Failure: The local server does not start, or the server fails.
    """
    speakers.check_name(name, speech_file)
    opened = Bundle(bundle)
    if speech_file is not None:
        speech = read_speech(speech_file, MIN_SECONDS)
    else:
        print(f"Recording for {seconds:g} s. Speak now; no one else should speak.", flush=True)
        speech = devices.record_speech(source, seconds)
        if not np.any(speech):
            raise InputError("the microphone recorded only silence; check that it is not muted")
    with ExitStack() as stack:
        embedding = enroll(server or stack.enter_context(local_server(opened.directory)), speech, credentials)
    print(f"{name}: stored in {speakers.save(name, embedding)}; use it with kb-client live --speaker {name}")
