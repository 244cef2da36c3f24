"""The large network as a gRPC service that sends hints to many devices."""
