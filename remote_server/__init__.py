"""The server: the large network as a gRPC service that sends hints to many devices."""
