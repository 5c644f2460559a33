"""The drawn diagrams say what the networks are: every box exists, shapes agree, the gradient flows along every arrow, and no arrow lacks."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from talkingface.core import InputError
from talkingface.data.faces import MEAN_FACE, to_crop
from talkingface.diagrams import (EXPERT_PARTS, LAYOUTS, ROUTES, connections, count_text, expert_parts, generator_parts, insertion_figure,
                                  framework_figure, framework_pictures, insertion_parts, model_figure, model_pictures, shown_inputs)
from talkingface.experts.avhubert import AVHubertExpert
from talkingface.generators.base import build_generator, random_batch
from talkingface.layers import parameter_count, to_unit
from talkingface.losses.av_expert import AVExpertLoss, ClipContext, plain_av_loss

SMALL = {'lipsync': dict(name='lipsync', width=.125), 'light': dict(name='light', width=8),
         'g4g': dict(name='g4g', size=96, scale=.25, width=.0625, blocks=1)}


@pytest.fixture(scope='module', params=SMALL)
def net(request): return build_generator(SMALL[request.param])


@pytest.fixture(scope='module', params=('lipsync', 'light'))
def paper_b(request): return build_generator(SMALL[request.param])


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
    assert {n for edge in edges for n in edge} == set(where) | {*shown_inputs(net), 'output'}


def tensors(values):
    if torch.is_tensor(values): return [values]
    return [t for v in values for t in tensors(v)] if isinstance(values, (list, tuple)) else []


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
    for field in shown_inputs(net): sources[field] = getattr(batch, field).requires_grad_(True)
    output = net(batch)
    for hook in hooks: hook.remove()
    starts = {k: [v] for k, v in sources.items()} | inside; ends = taken | {'output': [output]}
    for a, b in LAYOUTS[net.config['name']][1]:
        grads = torch.autograd.grad(sum(t.float().square().sum() for t in ends[b] if t.requires_grad), starts[a],
                                    retain_graph=True, allow_unused=True)
        assert any(g is not None for g in grads), f'{b} does not depend on {a}'
    net.eval()


def test_every_connection_of_the_network_is_an_arrow(net):
    "The converse: what flows directly is drawn, and once; routes belong to arrows."
    mode, weights = net.training, {k: v.clone() for k, v in net.state_dict().items()}; edges = LAYOUTS[net.config['name']][1]
    assert connections(net) == set(edges) and len(edges) == len(set(edges))
    assert all((a, b) in LAYOUTS[name][1] for name, a, b in ROUTES)
    assert net.training == mode and all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())


def drawn(net, batch, **hooks):
    "The output while some modules get a forward hook (module name -> hook) or, with `pre_`, one before."
    put = [net.get_submodule(k.removeprefix('pre_').replace('__', '.')) for k in hooks]
    kept = [m.register_forward_pre_hook(h) if k.startswith('pre_') else m.register_forward_hook(h) for m, (k, h) in zip(put, hooks.items())]
    try:
        with torch.no_grad(): return net.eval()(batch)
    finally:
        for h in kept: h.remove()


def test_the_light_network_has_skips_and_warps_the_reference():
    "By hand, apart from `connections`: each skip (the last 24, 16, 8 channels) zeroed, and another reference while `down` sees the old one."
    net = build_generator(SMALL['light']); batch = random_batch(net.size, 1, 1)
    torch.nn.init.normal_(net.paint.weight, std=.3); plain = drawn(net, batch); given = {}
    for i in range(3):
        cut = lambda _, takes, n=(24, 16, 8)[i]: (torch.cat([takes[0][:, :-n], torch.zeros_like(takes[0][:, -n:])], 1),)
        assert not torch.equal(drawn(net, batch, **{f'pre_up__{i}': cut}), plain), f'skip {i}'
    note = lambda i: lambda _, takes, gives: given.update({i: gives})
    drawn(net, batch, **{f'down__{i}': note(i) for i in range(4)})
    for field, rows in (('reference', slice(48, 96)), ('masked', slice(0, 48))):
        other = dataclasses.replace(batch, **{field: 1 - getattr(batch, field)})
        found = drawn(net, other, **{f'down__{i}': lambda *_, i=i: given[i] for i in range(4)})
        assert not torch.equal(found[..., rows, :], plain[..., rows, :]), field


def test_a_layout_that_lacks_an_arrow_is_not_drawn(expert, clip, monkeypatch):
    net = build_generator(SMALL['light']); where, edges = LAYOUTS['light']
    monkeypatch.setitem(LAYOUTS, 'light', (where, [e for e in edges if e != ('down', 'up')]))
    with pytest.raises(InputError, match='down → up'): model_figure(net, expert, model_pictures(net, clip, 4, 12, 4, 5, expert), {}, frames=24)


def test_shapes_in_the_boxes_are_those_of_a_pass(paper_b, expert):
    parts = generator_parts(paper_b)
    assert parts['audio_encoder'].takes[0] == (1, 80, 16) and parts['audio_projection'].takes[0][1:] == (1, 1)
    known = expert_parts(expert, 12); assert set(known) == set(EXPERT_PARTS)
    assert known['net.feature_extractor_video.resnet'].takes == ((1, 12, 44, 44),
                                                                 ) and known['net.feature_extractor_audio.proj'].takes == ((12,
                                                                     104),)
    assert known['net.encoder'].gives == ((12, 32),) and known['net.post_extract_proj'].takes == ((12, 64),)
    assert known['net.encoder'].parameters == parameter_count(expert.net.encoder)


def test_the_figure_names_every_part(paper_b, expert, clip):
    terms, mode = dict(pixel=10., perceptual=1., adversarial=1., av_unsupervised=2.), expert.training
    figure, table = model_figure(paper_b, expert, model_pictures(paper_b, clip, 4, 12, 4, 5, expert), terms, 'A title', 24)
    texts = ' '.join(t.get_text() for t in figure.axes[0].texts)
    for name, part in generator_parts(paper_b).items(): assert name in texts and count_text(part.parameters) in texts
    assert '10 · L_pixel' in texts and '2 · L_sync' in texts and 'A title' in texts
    assert table.groupby('network')['parameters'].sum()[paper_b.config['name']] == parameter_count(paper_b)
    assert expert.training == mode


def test_the_framework_of_g4g_names_parts_and_losses_of_both_places():
    net = build_generator(SMALL['g4g']); batch = random_batch(96, 1, 2); pictures = framework_pictures(net, batch)
    assert pictures['stills'].shape == (96, 5*96, 3) and not pictures['masked'][48:].any() and pictures['still_landmarks'].max() > 200
    figure, table = framework_figure(net, pictures, dict(attribute=1., ls_adversarial=.3, mouth_pixel=4., contrastive=5.), 'A title')
    texts = ' '.join(t.get_text() for t in figure.axes[0].texts)
    for name, part in generator_parts(net).items(): assert name in texts and count_text(part.parameters) in texts
    assert all(f'{weight} · {term}' in texts for weight, term in (('1', 'L_v'), ('0.3', 'L_GAN'), ('4', 'L_r'), ('5', 'L_con'))) and 'A title' in texts
    assert table['parameters'].sum() == parameter_count(net)


def test_networks_with_and_without_stills_have_figures_of_their_own(expert):
    with pytest.raises(InputError, match='framework_figure'): model_figure(build_generator(SMALL['g4g']), expert, {}, {})
    with pytest.raises(InputError, match='model_figure'): framework_figure(build_generator(SMALL['light']), {}, {})


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
    figure, table = insertion_figure(parts, 'A title'); told = ' '.join(t.get_text() for t in figure.axes[0].texts)
    assert 'only the 9 frames' in told and 'from 13 mouths' in told
    assert table['cosine'].notna().sum() == 5 and len(table) == 24
    assert f"L_sync = {parts['loss']:.3f}" in ' '.join(t.get_text() for t in figure.axes[0].texts)
    watched = []; hook = expert.net.feature_extractor_video.proj.register_forward_hook(lambda m, a, b: watched.append(b.shape[1]))
    with torch.no_grad(): (term := AVExpertLoss(expert))(output, [context]); watched.clear(); term(output, [context])
    hook.remove(); assert watched == [9]
    with pytest.raises(InputError, match='chunk of 5 frames'): insertion_parts(frames, clip, drawn, 22, expert)
