"""The server core, independent of the transport: admission, sessions, and the engines that compute hints."""
