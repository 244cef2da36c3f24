"""The wire contract: ``hints.proto``, its generated stubs, and the encodings of what its bytes fields carry."""
