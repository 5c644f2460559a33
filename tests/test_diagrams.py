"""The drawn diagrams say what the networks are: every box exists, shapes agree, and the gradient flows along every arrow."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from talkingface.core import InputError
from talkingface.data.faces import MEAN_FACE, to_crop
from talkingface.diagrams import (EXPERT_PARTS, LAYOUTS, count_text, expert_parts, generator_parts, insertion_figure,
                                  insertion_parts,
                                  model_figure, model_pictures)
from talkingface.experts.avhubert import AVHubertExpert
from talkingface.generators.base import build_generator, random_batch
from talkingface.layers import parameter_count, to_unit
from talkingface.losses.av_expert import AVExpertLoss, ClipContext, plain_av_loss

SMALL = {'lipsync': dict(name='lipsync', width=.125), 'light': dict(name='light', width=8)}


@pytest.fixture(scope='module', params=SMALL)
def net(request): return build_generator(SMALL[request.param])


@pytest.fixture(scope='module')
def expert():
    torch.manual_seed(0)
    return AVHubertExpert(dict(dim=32, layers=2, heads=2, ffn=64, conv_pos=8, conv_pos_groups=4, front_width=.125, prelu=False),
                          shrink=2)


@pytest.fixture(scope='module')
def clip():
    draw, box = np.random.default_rng(0), np.array([25.4, 23., 230.6, 279.6])
    points = to_crop(np.repeat(MEAN_FACE[None], 24, 0), np.repeat(box[None], 24, 0))
    return SimpleNamespace(name='toy', faces=draw.integers(0, 256, (24, 3, 96, 96), dtype=np.uint8), landmarks=points,
                           valid=np.ones(24, bool), frames=24,
                           wav=draw.normal(0, .1, 640*24).astype(np.float32),
                           mel=draw.uniform(-4, 4, (80, 77)).astype(np.float32),
                           boxes=np.repeat(np.array([[20., 10., 120., 150.]]), 24, 0))


def test_every_box_is_a_part_and_every_part_has_a_box(net):
    where, edges = LAYOUTS[net.config['name']]; parts = generator_parts(net)
    assert set(where) == set(parts) == {n for n, c in net.named_children() if parameter_count(c)}
    assert sum(p.parameters for p in parts.values()) == parameter_count(net)
    assert {n for edge in edges for n in edge} == set(where) | {'reference', 'masked', 'mel', 'output'}


def tensors(values): return [values] if torch.is_tensor(values) else [t for v in values for t in tensors(v)]


def test_the_gradient_flows_along_every_arrow(net):
    "What a part gives depends on what the part before it gave; what has no arrow towards it from an input does not hear it."
    net = net.train(); inside, taken, hooks = {}, {}, []
    for name, child in net.named_children():
        for module in (child if isinstance(child, nn.ModuleList) else [child]):
            hooks.append(module.register_forward_hook(lambda _, takes, gives,
                                                      name=name: (inside.setdefault(name, []).extend(tensors(gives)),
                                                                                           taken.setdefault(name,
                                                                                               []).extend(tensors(takes)))
                                                                                                   and None))
    batch = random_batch(net.size, 1, 2); sources = {}
    for field in ('reference', 'masked', 'mel'): sources[field] = getattr(batch, field).requires_grad_(True)
    output = net(batch)
    for hook in hooks: hook.remove()
    starts = {k: [v] for k, v in sources.items()} | inside; ends = taken | {'output': [output]}
    for a, b in LAYOUTS[net.config['name']][1]:
        grads = torch.autograd.grad(sum(t.float().square().sum() for t in ends[b] if t.requires_grad), starts[a],
                                    retain_graph=True, allow_unused=True)
        assert any(g is not None for g in grads), f'{b} does not depend on {a}'
    net.eval()


def test_shapes_in_the_boxes_are_those_of_a_pass(net, expert):
    parts = generator_parts(net)
    assert parts['audio_encoder'].takes[0] == (1, 80, 16) and parts['audio_projection'].takes[0][1:] == (1, 1)
    known = expert_parts(expert, 12); assert set(known) == set(EXPERT_PARTS)
    assert known['net.feature_extractor_video.resnet'].takes == ((1, 12, 44, 44),
                                                                 ) and known['net.feature_extractor_audio.proj'].takes == ((12,
                                                                     104),)
    assert known['net.encoder'].gives == ((12, 32),) and known['net.post_extract_proj'].takes == ((12, 64),)
    assert known['net.encoder'].parameters == parameter_count(expert.net.encoder)


def test_the_figure_names_every_part(net, expert, clip):
    terms, mode = dict(pixel=10., perceptual=1., adversarial=1., av_unsupervised=2.), expert.training
    figure, table = model_figure(net, expert, model_pictures(net, clip, 4, 12, 4, 5, expert), terms, 'A title', 24)
    texts = ' '.join(t.get_text() for t in figure.axes[0].texts)
    for name, part in generator_parts(net).items(): assert name in texts and count_text(part.parameters) in texts
    assert '10 · L_pixel' in texts and '2 · L_sync' in texts and 'A title' in texts
    assert table.groupby('network')['parameters'].sum()[net.config['name']] == parameter_count(net)
    assert expert.training == mode


def test_a_part_without_a_place_is_refused(expert, clip):
    odd = build_generator(SMALL['light']); odd.more = nn.Linear(2, 2)
    with pytest.raises(InputError, match='more'): generator_parts(odd)


def test_the_insertion_is_that_of_the_loss(expert, clip):
    "Frames outside the chunk are untouched; cosines and loss are those of the loss, cached and plain."
    frames = np.random.default_rng(1).integers(0, 256, (24, 160, 160, 3), dtype=np.uint8); drawn = 255 - clip.faces[8:13]
    parts = insertion_parts(frames, clip, drawn, 8, expert)
    outside = np.r_[0:8, 13:24]; assert np.array_equal(parts['put'][outside], frames[outside])
    x0, y0, x1, y1 = (int(v) for v in clip.boxes[0])
    assert np.array_equal(parts['put'][8:13, :y0], frames[8:13, :y0]) and not np.array_equal(parts['put'][8:13, y0:y1],
        frames[8:13, y0:y1])
    context, output = ClipContext.of(clip.faces, clip.landmarks, clip.wav, 8), to_unit(torch.from_numpy(drawn))[None]
    with torch.no_grad(): assert parts['loss'] == pytest.approx(float(plain_av_loss(expert, output, [context])), abs=1e-5)
    assert parts['loss'] == pytest.approx(float(AVExpertLoss(expert)(output, [context]).detach()))
    mixed = np.array(clip.faces); mixed[8:13] = drawn
    with torch.no_grad(): whole = expert.embed_video(to_unit(torch.from_numpy(mixed))[None],
                                                     torch.from_numpy(clip.landmarks)[None])[0]
    assert np.allclose(whole, parts['lips'], atol=1e-4)
    figure, table = insertion_figure(parts, 'A title'); assert table['cosine'].notna().sum() == 5 and len(table) == 24
    assert f"L_sync = {parts['loss']:.3f}" in ' '.join(t.get_text() for t in figure.axes[0].texts)
    with pytest.raises(InputError, match='chunk of 5 frames'): insertion_parts(frames, clip, drawn, 22, expert)
