"""The wire protocol: ``hints.proto``, its generated stubs, and the codec of the bytes fields."""
