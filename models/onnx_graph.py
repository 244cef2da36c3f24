"""Writes the device's network as an ONNX graph that computes one frame, for devices without torch.

The network is the small one of a pair, or one network alone, which can be a large one with self-attention.

The graph contains only the network. Its caller, :mod:`models.onnx_stream`, owns all buffers and moves their data:

- Attention caches are rings, which the graph reads but never writes. The key and value of the new frame are outputs.
  Inside the graph they are used beside the ring, and a mask excludes the oldest row. The caller then writes them into
  that row.
- States that change completely, those of LSTMs, are an input and an output, so that two buffers can alternate.
- The caller overlaps and adds the frames.

The layouts avoid transposition: spectra and the inputs of attention are ``[channels, F]``, features are ``[F, D]``.
"""

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.models.arrival_fusion import ArrivalFusion
from knowledge_boosting.models.arrivals import MERGES, Hint
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, Pair
from knowledge_boosting.models.layers import HintFusion
from knowledge_boosting.models.onnx_layers import (
    Arrivals,
    Graph,
    arrival_fusion,
    arrival_inputs,
    convolution,
    delayed_fusion,
    grid_net_block,
    running_level,
    self_attention,
)
from knowledge_boosting.models.onnx_stream import OnnxStream, check_sizes, load_graph
from knowledge_boosting.models.pair import SmallModel, torch_hints
from knowledge_boosting.models.tfgridnet import GridNetBlock


def frame_graph(model: SmallModel) -> bytes:
    """Return an ONNX file that computes one frame of the device's network for one stream.

    These are its inputs, all float32, for each block ``i`` and each fusion ``j`` (after every block except the last):

    ===================  =======================  =======================================================
    ``window``           ``[M, n_fft]``           the frame's samples
    ``level``            ``[1]``                  ``new_level`` of the frame before; only with a running level
    ``input_past``       ``[1, 2M, 2, F]``        ``input_new`` of the previous two frames, the older first
    ``hidden_i``         ``[1, F, H]``            ``new_hidden_i`` of the frame before; ``cell_i`` likewise
    ``output_past``      ``[1, D, 2, F]``         ``output_new`` of the previous two frames
    ``speaker_weight_j`` ``[F, D]``               TSE: modulation by the speaker layer; ``speaker_bias_j`` likewise
    ``hint``             ``[hint channels, F]``   the hint of ``delay`` frames ago, or zeros
    ``delayed_j``        ``[F, D]``               ``features_j`` of ``delay`` frames ago; not with delay 0
    ``keys_j``           ``[L, key size, W]``     ``key_j`` of the last W frames, in any order
    ``values_j``         ``[L, W, value size]``   ``value_j`` of the same frames
    ``mask``             ``[W]``                  minus infinity at the oldest of these frames, else 0
    ``self_keys_i``      ``[L, key size, W]``     ``self_key_i`` of the last W frames; only with self-attention
    ``self_values_i``    ``[L, W, value size]``   ``self_value_i`` of the same frames
    ``self_mask``        ``[W]``                  as ``mask``; minus infinity also for rows without a frame
    ===================  =======================  =======================================================

    If hints are used on arrival, K are merged at each frame, and ``hint``, ``delayed_j`` and ``mask`` are replaced by:

    ===================  =======================  =======================================================
    ``hint``             ``[hint channels, K F]`` the hints to merge at this frame
    ``waiting_j``        ``[K F, D]``             ``features_j`` of the frames of these hints
    ``ages``             ``[W + K]``              the age of the frame in each row of the rings and of each hint, 1 to W
    ``mask``             ``[W + K]``              0 for rows and hints to attend to, else a large negative number
    ``youngest``         ``[1]``                  the smallest age that is attended to; W if there is none
    ``strength``         ``[1]``                  the strength of fusion; 0 if nothing is attended to
    ===================  =======================  =======================================================

    At the start of a stream, all inputs except ``self_mask`` are zeros. The outputs are ``frame`` ``[S', n_fft]``,
    which is already divided by the window sums and must be overlapped and added; ``input_new`` ``[1, 2M, 1, F]``,
    ``output_new`` ``[1, D, 1, F]``, ``new_hidden_i``, ``new_cell_i``, ``features_j`` ``[F, D]``, ``key_j`` and
    ``self_key_i`` ``[L, 1, key size]``, ``value_j`` and ``self_value_i`` ``[L, 1, value size]``. On arrival,
    ``key_j`` and ``value_j`` are ``[L, K, ...]``.
    """
    config, network = model.config, model.network
    framing, mics, bins, signals = (
        config.framing,
        config.microphones,
        config.framing.bins,
        config.spectrum_channels // 2,
    )
    channels, hidden, window = config.on_device.channels, config.on_device.hidden, config.on_device.window
    graph = Graph("small")

    # The spectrum [M, 2F] is reshaped to [2M, F], so its channels are (real, imaginary) of every microphone.
    spectrum = graph.node("MatMul", graph.input("window", mics, framing.n_fft), graph.weight(model.stft.analysis))
    gain = ""
    if model.level is not None:
        spectrum, gain = running_level(graph, model.level, spectrum)
    new = graph.reshape(spectrum, 1, 2 * mics, 1, bins)
    graph.output(new, "input_new", 1, 2 * mics, 1, bins)
    past = graph.input("input_past", 1, 2 * mics, 2, bins)
    conv = network.input_conv.conv
    order = [part * mics + mic for mic in range(mics) for part in range(2)]
    x = convolution(graph, graph.node("Concat", past, new, axis=2), conv, conv.weight[:, order])
    x = graph.node("Transpose", graph.reshape(x, channels, bins), perm=[1, 0])
    x = graph.layer_norm(x, network.input_norm.weight, network.input_norm.bias)

    hint = mask = self_mask = ""
    arrivals: Arrivals | None = None
    if len(network.fusion) and config.on_arrival:
        arrivals = arrival_inputs(graph, config.hint_channels, bins, window)
    elif len(network.fusion):
        hint, mask = graph.input("hint", config.hint_channels, bins), graph.input("mask", window)
    if config.on_device.self_attention:
        self_mask = graph.input("self_mask", window)
    for index, block in enumerate(cast("Iterable[GridNetBlock]", network.blocks)):
        x = grid_net_block(graph, block, x, index, bins, channels, hidden)
        if block.attention is not None:
            x = self_attention(graph, block.attention, x, self_mask, index)
        if index == len(network.blocks) - 1:
            break
        if len(network.speaker):
            weight = graph.input(f"speaker_weight_{index}", bins, channels)
            x = graph.node("Mul", x, weight)
            x = graph.node("Add", x, graph.input(f"speaker_bias_{index}", bins, channels))
        if len(network.fusion):
            fusion = network.fusion[index]
            if isinstance(fusion, ArrivalFusion):
                assert arrivals is not None
                x = arrival_fusion(graph, fusion, x, arrivals, index)
            else:
                x = delayed_fusion(graph, cast("HintFusion", fusion), x, hint, mask, index)

    new = graph.reshape(graph.node("Transpose", x, perm=[1, 0]), 1, channels, 1, bins)
    graph.output(new, "output_new", 1, channels, 1, bins)
    conv = network.output_conv.conv
    past = graph.input("output_past", 1, channels, 2, bins)
    embedding = convolution(graph, graph.node("Concat", past, new, axis=2), conv, conv.weight)
    # [2S', F] is reshaped to [S', 2F], with all real parts before all imaginary parts, so the rows of the matrix are
    # reordered. It also includes the division by the window sums.
    synthesis = model.stft.synthesis.unflatten(0, (bins, 2)).transpose(0, 1).flatten(0, 1).clone()
    head, body = model.stft.head_gain, model.stft.body_gain
    synthesis[:, : framing.lookahead] *= head
    synthesis[:, framing.lookahead : framing.chunk] *= body
    synthesis[:, framing.chunk :] *= head
    frame = graph.node("MatMul", graph.reshape(embedding, signals, 2 * bins), graph.weight(synthesis))
    graph.output(graph.node("Mul", frame, gain) if gain else frame, "frame", signals, framing.n_fft)
    return graph.file({"task": config.task, "delay": "arrival" if config.on_arrival else str(config.delay)})


def check_graph(graph: bytes, model: SmallModel) -> None:
    """Run graph and network on frames of noise, a third of them without hints, and compare their samples.

    Raises:
        InputError: the network is too large to run frame by frame.
        Failure: the samples differ by more than 1e-4 of the loudest one.
    """
    config, rng = model.config, np.random.default_rng(0)
    embedding, speaker = None, {}
    if config.needs_speaker:
        embedding = torch.from_numpy(rng.normal(0, 1 / 16, (1, SPEAKER_EMBEDDING_SIZE)).astype(np.float32))
    loudest = worst = 0.0
    session = load_graph(graph)
    try:
        check_sizes(session)
    except ValueError as error:
        raise InputError(
            f"too large to run on a device: {error}; give the network fewer heads or a shorter window"
        ) from None
    with torch.inference_mode():
        state = model.initial_state(1, embedding)
        for index, modulation in enumerate(state.network.speaker):
            speaker[f"speaker_weight_{index}"] = modulation.weight[0, 0].numpy()
            speaker[f"speaker_bias_{index}"] = modulation.bias[0, 0].numpy()
        stream = OnnxStream(session, config, speaker)
        for frame in range(2 * config.on_device.window):
            window = rng.normal(0, 0.1, (config.microphones, config.framing.n_fft)).astype(np.float32)
            hints: list[Hint] = []
            for number in range((MERGES if config.on_arrival else 1) if isinstance(config, Pair) and frame % 3 else 0):
                values = rng.normal(0, 1, (config.hint_channels, config.framing.bins)).astype(np.float32)
                hints.append(Hint(config.delay + number, values))
            expected, state = model(torch.from_numpy(window)[None], state, torch_hints(config, hints))
            worst = max(worst, float(np.abs(stream.step(window, hints) - expected[0].numpy()).max()))
            loudest = max(loudest, float(expected.abs().max()))
    if not worst <= 1e-4 * loudest:
        raise Failure(f"the exported graph differs from the network by {worst:.2g} (loudest sample {loudest:.2g})")
