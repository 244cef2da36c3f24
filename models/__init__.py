"""The networks, their streaming state, bundles, checkpoint import and export.

``config`` and ``manifest`` describe models without torch, for devices that have none; everything else needs torch.
"""
