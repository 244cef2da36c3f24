"""The server that knows no transport: who may have a session, the session, and the networks that answer it."""
