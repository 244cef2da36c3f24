"""The networks, their streaming state, bundles, and import and export of checkpoints.

The modules ``bundle``, ``config``, ``manifest``, ``onnx_stream`` and ``tasks`` do not need torch, so that a device can
do without it.
"""
