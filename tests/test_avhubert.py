"""AV-HuBERT: published layout and numbers, passes, padding, long clips, the way from the pixels to the mouth, sound rows."""
import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from goldens import compare, det_state, load_golden
from torch.nn import functional as F

from talkingface.core import InputError, ParamsError
from talkingface.data import faces as data_faces
from talkingface.data.audio import log_filterbank
from talkingface.data.portrait import Identity, Scene, render
from talkingface.experts.avhubert import (ANCHORS, BASE, CROP_ASPECT, LARGE, STABLE, STANDARD_BOX, TINY, AVHubert, AVHubertExpert,
                                          LipResNet, PositionConv, TransformerEncoder, filterbank_rows, mouth_input,
                                          plain_encoder, plain_features, stored_mouths)
from talkingface.experts.base import check_expert, embed_clip, embed_stored, frozen

SMALL = dict(dim=32, layers=3, heads=4, ffn=48, conv_pos=8, conv_pos_groups=4, front_width=.125, clusters=20, final_dim=16)


def lively(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    "Every weight and statistic away from its initial value, so that none is without effect."
    draw = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if not value.is_floating_point(): continue
        noise = torch.randn(value.shape, generator=draw)
        if name.endswith('running_var'): value.copy_(1 + .3*noise.abs())
        elif value.ndim > 1: value.add_(noise*value.std()*.3)
        else: value.add_(.1*noise)
    return net.eval()


@pytest.fixture(scope='module')
def net() -> AVHubert:
    torch.manual_seed(0)
    return frozen(lively(AVHubert(**SMALL)))


@pytest.fixture(scope='module')
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw, padding = torch.Generator().manual_seed(1), torch.zeros(2, 11, dtype=torch.bool)
    padding[1, 8:] = True
    return torch.randn(2, 11, 104, generator=draw), torch.randn(2, 1, 11, 88, 88, generator=draw), padding


# ---- the published layout ----

@pytest.mark.parametrize('size, tensors, elements', [(BASE, 346, 103_339_900), (LARGE, 538, 325_408_124)])
def test_published_sizes(size, tensors, elements):
    with torch.device('meta'): state = AVHubert(**size).state_dict()
    dim = size['dim']
    assert len(state) == tensors and sum(v.numel() for v in state.values()) == elements
    for key, shape in {'mask_emb': (104,), 'label_embs_concat': (2004, 256), 'final_proj.weight': (256, dim),
                       'feature_extractor_audio.proj.weight': (dim, 104), 'feature_extractor_video.proj.weight': (dim, 512),
                       'feature_extractor_video.resnet.frontend3D.0.weight': (64, 1, 5, 7, 7),
                       'feature_extractor_video.resnet.frontend3D.2.weight': (64,),
                       'feature_extractor_video.resnet.trunk.layer3.0.downsample.0.weight': (256, 128, 1, 1),
                       'feature_extractor_video.resnet.trunk.layer4.1.relu2.weight': (512,),
                       'layer_norm.weight': (2*dim,), 'post_extract_proj.weight': (dim, 2*dim),
                       'encoder.pos_conv.0.weight_g': (1, 1, 128), 'encoder.pos_conv.0.weight_v': (dim, dim//16, 128),
                       f'encoder.layers.{size["layers"] - 1}.fc1.weight': (4*dim, dim)}.items():
        assert tuple(state[key].shape) == shape, key


def test_a_fine_tuned_file_has_no_final_projection():
    with torch.device('meta'): pretrained, tuned = AVHubert(**SMALL), AVHubert(**SMALL, predict=False)
    assert set(pretrained.state_dict()) - set(tuned.state_dict()) == {'final_proj.weight', 'final_proj.bias'}
    assert 'label_embs_concat' not in AVHubert(**{**SMALL, 'clusters': 0}).state_dict()
    with pytest.raises(InputError, match='predicts no clusters'): tuned.logits(torch.zeros(1, 32, device='meta'))


@pytest.mark.parametrize('which', ['pre', 'post'])
def test_encoder_golden(which):
    golden = load_golden('fairseq_wav2vec2_encoder_tiny')
    encoder = TransformerEncoder(64, 3, 4, 128, norm_first=which == 'pre').eval()
    encoder.load_state_dict(det_state(golden, which))
    x, padding = torch.from_numpy(golden.inputs['x']), torch.from_numpy(golden.inputs['padding_mask'])
    kept = x.clone()
    with torch.no_grad():
        got = {f'{which}_nomask': encoder(x), f'{which}_mask': encoder(x, padding),
               f'{which}_posconv': encoder.pos_conv(x.transpose(1, 2)).transpose(1, 2)}
        got |= {f'{which}_layer{at}': encoder(x, padding, layer=at + 1) for at in range(3)}
        plain = {f'{which}_nomask': plain_encoder(encoder, x), f'{which}_mask': plain_encoder(encoder, x, padding)}
        plain |= {f'{which}_layer{at}': plain_encoder(encoder, x, padding, at + 1) for at in range(3)}
    compare(golden, got, only=set(got))
    compare(golden, plain, only=set(plain))
    assert torch.equal(x, kept), "the padded rows of the caller's tensor were changed"


def test_position_weight_norm_is_torchs():
    torch.manual_seed(0)
    ours = PositionConv(32, 8, 4)
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(32, 32, 8, padding=4, groups=4), dim=2)
    theirs.parametrizations.weight.original0.data.copy_(ours.weight_g*1.3)
    theirs.parametrizations.weight.original1.data.copy_(ours.weight_v)
    with torch.no_grad(): ours.weight_g.mul_(1.3); theirs.bias.copy_(ours.bias.normal_())
    x = torch.randn(2, 32, 9)
    torch.testing.assert_close(ours(x), theirs(x)[..., :9])
    ours(x).sum().backward()
    assert ours.weight_g.grad.abs().sum() > 0 and ours.weight_v.grad.abs().sum() > 0


# ---- the model against the plain one, and its passes ----

@pytest.mark.parametrize('options', [{}, dict(norm_first=False), dict(prelu=False), dict(fuse='add')])
def test_equals_the_plain_version(options, batch):
    audio, video, padding = batch
    torch.manual_seed(0)
    net = frozen(lively(AVHubert(**{**SMALL, **options})))
    for streams in (dict(audio=audio, video=video), dict(audio=audio), dict(video=video)):
        for layer in (None, 1, 3):
            torch.testing.assert_close(net.features(**streams, padding_mask=padding, layer=layer),
                                       plain_features(net, **streams, padding_mask=padding, layer=layer), rtol=1e-4, atol=1e-4)


def test_missing_modality_is_zero_after_its_projection(net, batch):
    audio, video, _ = batch
    silent = frozen(lively(AVHubert(**SMALL)))
    silent.load_state_dict(net.state_dict())
    for value in silent.feature_extractor_audio.parameters(): value.zero_()
    torch.testing.assert_close(net.features(video=video), silent.features(torch.randn_like(audio), video))
    assert not torch.allclose(net.features(video=video), net.features(torch.zeros_like(audio), video), atol=1e-3)
    both = net(audio, video, drop=torch.tensor([1, 2]))
    torch.testing.assert_close(both[0], net.features(video=video)[0])
    torch.testing.assert_close(both[1], net.features(audio=audio)[1])
    torch.testing.assert_close(net(audio, video, drop=torch.tensor([0, 0])), net.features(audio, video))


def test_audio_comes_before_video(net, batch):
    audio, video, _ = batch
    a = net.feature_extractor_audio['proj'](audio)
    v = net.feature_extractor_video['proj'](net.feature_extractor_video['resnet'](video))
    joined = F.layer_norm(torch.cat([a, v], -1), (64,), net.layer_norm.weight, net.layer_norm.bias)
    torch.testing.assert_close(net.fuse(audio, video), net.post_extract_proj(joined))


def test_padding_changes_nothing(net, batch):
    audio, video, padding = batch
    alone = net.features(audio[1:, :8], None)
    padded = net.features(audio, None, padding)
    torch.testing.assert_close(padded[1, :8], alone[0], rtol=1e-4, atol=1e-5)
    noisy = audio.clone()
    noisy[1, 8:] = 50
    torch.testing.assert_close(net.features(noisy, None, padding)[1, :8], alone[0], rtol=1e-4, atol=1e-5)


def test_layers_and_the_final_norm(net, batch):
    last = net.features(batch[0], layer=3)
    torch.testing.assert_close(net.encoder.layer_norm(last), net.features(batch[0]))
    for layer in (0, 4):
        with pytest.raises(InputError, match='expected 1 to 3'): net.features(batch[0], layer=layer)


def test_bad_streams_are_refused(net, batch):
    audio, video, _ = batch
    with pytest.raises(InputError, match='got neither'): net.features()
    with pytest.raises(InputError, match='as many audio rows'): net.features(audio[:, 1:], video)
    with pytest.raises(InputError, match='grey mouths'): net.features(video=video[:, 0])
    with pytest.raises(InputError, match="'concat' or 'add'"): AVHubert(**{**SMALL, 'fuse': 'weighted_sum'})


def test_cluster_prediction(net, batch):
    audio = batch[0]
    h = net.features(audio)
    cosine = F.cosine_similarity(net.final_proj(h)[:, :, None], net.label_embs_concat, dim=-1)
    torch.testing.assert_close(net.logits(h), cosine*10, rtol=1e-4, atol=1e-4)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 3:6] = True
    masked = net.mask_audio(audio, mask)
    assert torch.equal(masked[~mask], audio[~mask]) and torch.equal(masked[mask], net.mask_emb.expand(3, -1))


def test_modality_dropout_is_drawn_per_clip():
    torch.manual_seed(0)
    net = AVHubert(**SMALL, modality_dropout=.5, audio_dropout=.8)
    drop = net.draw_drop(5000, torch.Generator().manual_seed(0))
    share = torch.bincount(drop, minlength=3)/5000
    torch.testing.assert_close(share, torch.tensor([.5, .4, .1]), rtol=0, atol=.03)
    assert torch.equal(drop, net.draw_drop(5000, torch.Generator().manual_seed(0)))


def test_it_learns_the_clusters_of_hidden_frames():
    torch.manual_seed(0)
    net = AVHubert(**{**SMALL, 'prelu': False, 'clusters': 4})
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    labels = (torch.arange(40)//5 % 4).expand(4, -1)
    audio = F.one_hot(labels, 104).float()*5 + torch.randn(4, 40, 104)*.3
    for _ in range(60):
        mask = torch.rand(4, 40) < .3
        loss = F.cross_entropy(net.logits(net(net.mask_audio(audio, mask)))[mask], labels[mask])
        adam.zero_grad(); loss.backward(); adam.step()
    assert loss < .5 < F.cross_entropy(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))


def test_half_precision_is_close(net, batch):
    audio, video, padding = batch
    with torch.autocast('cpu', torch.bfloat16): low = net.features(audio, video, padding)
    assert F.cosine_similarity(low.float(), net.features(audio, video, padding), dim=-1)[~padding].min() > .99
    for value in net.double().features(audio.double(), video.double()): assert value.dtype == torch.float64
    net.float()


# ---- long clips ----

@pytest.mark.parametrize('frames, clips, piece', [(21, 1, 8), (16, 1, 8), (17, 2, 8), (9, 1, 1), (5, 3, 2)])
def test_front_end_in_pieces_equals_the_whole(frames, clips, piece):
    torch.manual_seed(0)
    front, video = frozen(lively(LipResNet(.125, piece=10**6))), torch.randn(clips, 1, frames, 44, 44)
    whole = front(video)
    front.piece = piece
    torch.testing.assert_close(front(video), whole, rtol=1e-5, atol=1e-6)


def test_a_minute_goes_through_in_pieces():
    torch.manual_seed(0)
    expert, seen = frozen(AVHubertExpert(dict(SMALL, front_width=.0625), shrink=2)), []
    expert.net.feature_extractor_video['resnet'].trunk.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    faces = torch.randint(256, (1500, 3, 48, 48), dtype=torch.uint8)
    v, a = embed_clip(expert, faces, torch.randn(1500*640)*.1)
    assert v.shape == a.shape == (1500, 32)
    assert sum(seen) == 1500 and max(seen) <= 64                             # frames after the stem: none is computed twice


# ---- from the face crop to the mouth ----

@pytest.fixture(scope='module')
def filmed():
    "16 frames of a drawn face that turns and speaks: full frames, landmarks in them, crops, landmarks in these."
    identity = Identity(3)
    scene, frames, marks = Scene(identity, 5, size=160), [], []
    for t in range(16):
        pose = (.1*np.sin(t/5), .05, .12*np.sin(t/4), 2*t/16, 0., 1.)
        frame = render(identity, scene, np.full(8, .5 + .5*np.sin(t)), pose, frame=t)
        frames.append(frame.image); marks.append(frame.landmarks)
    frames, marks = np.stack(frames), np.stack(marks).astype(np.float32)
    boxes = data_faces.smooth_boxes(data_faces.face_box(marks))
    return frames, marks, data_faces.crop_faces(frames, boxes), data_faces.to_crop(marks, boxes)


def tensors(faces: np.ndarray, landmarks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(faces.transpose(0, 3, 1, 2).copy())[None], torch.from_numpy(landmarks)[None]


@pytest.mark.parametrize('enlarge', [1, 3])
def test_mouths_equal_those_of_opencv(filmed, enlarge):
    _, _, crops, marks = filmed
    crops = crops.repeat(enlarge, 1).repeat(enlarge, 2)                      # at 3 the warp shrinks and has to average
    marks = (marks + .5)*enlarge - .5
    want = data_faces.mouth_crops(crops, marks)[:, 4:92, 4:92].astype(np.float64)
    got = mouth_input(*tensors(crops, marks), aspect=1., normalise=False)[0, 0].double().numpy()*255
    gap = np.abs(got - want)
    assert gap.mean() < .5 and gap.max() < 3                                 # grey levels; OpenCV rounds twice


def test_mouths_of_crops_look_like_those_of_the_full_frame(filmed):
    frames, marks, crops, crop_marks = filmed
    want = stored_mouths(torch.from_numpy(data_faces.mouth_crops(frames, marks))[None], shrink=2)
    got = mouth_input(*tensors(crops, crop_marks), shrink=2)
    squeezed = mouth_input(*tensors(crops, crop_marks), aspect=1., shrink=2)
    difference = lambda x: (x - want).abs().mean()*.165*255
    assert got.shape == want.shape == (1, 1, 16, 44, 44)
    assert difference(got) < 4 < 2*difference(got) + 4 and difference(got) < .5*difference(squeezed)


def test_standard_crop_is_that_of_the_mean_face():
    mean, stable = data_faces.MEAN_FACE, list(data_faces.STABLE_POINTS)
    assert stable == list(STABLE) and CROP_ASPECT == data_faces.BOX_ASPECT
    np.testing.assert_allclose(ANCHORS, [*mean[stable], mean[48:68].mean(0)], atol=1e-3)
    np.testing.assert_allclose(STANDARD_BOX, data_faces.face_box(mean[None])[0], atol=1e-3)
    faces = torch.rand(1, 3, 3, 96, 96)
    marks = data_faces.to_crop(mean[None], np.array([STANDARD_BOX])).repeat(3, 0)[None]
    torch.testing.assert_close(mouth_input(faces), mouth_input(faces, torch.from_numpy(marks)), rtol=0, atol=2e-3)


def test_gradcheck_of_the_mouth(filmed):
    marks = torch.from_numpy(filmed[3][:2])[None].double()/8
    faces = torch.rand(1, 2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mouth_input(x, marks, size=8), (faces,))


def test_loss_reaches_the_lips(filmed):
    faces, marks = tensors(filmed[2], filmed[3])
    expert = frozen(AVHubertExpert(dict(SMALL), shrink=2))
    faces = (faces/255.).requires_grad_()
    wav = torch.randn(1, 16*640)*.1
    (1 - expert.similarity(*expert(faces, expert.audio_features(wav), marks))).mean().backward()
    slope = faces.grad.abs().sum((0, 1, 2))
    assert slope[60:90, 25:70].mean() > 20*slope[:25].mean()                  # the mouth, not the forehead
    assert all(p.grad is None for p in expert.parameters())


def test_bad_faces_and_landmarks(filmed):
    faces, marks = tensors(filmed[2], filmed[3])
    with pytest.raises(InputError, match='fill_tracks'): mouth_input(faces, marks*float('nan'))
    with pytest.raises(InputError, match='expected landmarks'): mouth_input(faces, marks[:, :3])
    with pytest.raises(InputError, match='expected faces'): mouth_input(faces[0])


# ---- sound ----

@pytest.mark.parametrize('samples, frames', [(16000, None), (10*640, 10), (640*3 + 17, 5), (300, 2), (640*30, 7)])
def test_sound_rows_equal_the_numpy_ones(samples, frames):
    wav = np.random.default_rng(0).normal(0, .1, samples).astype(np.float32)
    wav[samples//2:] *= .001
    want = log_filterbank(wav, frames=max(1, samples//640) if frames is None else frames)
    got = filterbank_rows(torch.from_numpy(wav)[None], frames, normalise=False)[0].numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)
    scaled = log_filterbank(wav, frames=len(want), normalise=True)
    np.testing.assert_allclose(filterbank_rows(torch.from_numpy(wav)[None], frames)[0].numpy(), scaled, atol=1e-4)


def test_sound_rows_of_a_batch_and_of_silence():
    wav = torch.randn(3, 6400)*.1
    wav[1] = 0
    rows = filterbank_rows(wav)
    for i in range(3): torch.testing.assert_close(filterbank_rows(wav[i:i + 1])[0], rows[i])
    assert rows[1, :-1].abs().max() < 1e-2                                    # no variance; the last row is filled up with zeros
    with pytest.raises(InputError, match='expected sound'): filterbank_rows(wav[0])


# ---- the expert ----

def test_contract():
    check_expert(AVHubertExpert(TINY))
    check_expert(AVHubertExpert(dict(SMALL, norm_first=False), layer=2, shrink=2, phones=['a', 'b']))


def test_config_rebuilds_the_expert():
    expert = AVHubertExpert(dict(SMALL), layer=2, phones=['a', 'b'], shrink=2, reference=[list(p) for p in ANCHORS[:5]])
    config = json.loads(json.dumps(expert.config))
    assert config.pop('name') == 'avhubert'
    again = AVHubertExpert(**config)
    again.load_state_dict(expert.state_dict())
    assert again.phone_logits(audio=torch.randn(1, 4, 104)).shape == (1, 4, 3)


def test_landmarks_of_a_stored_clip_are_used(filmed):
    class Stored:
        faces, landmarks = filmed[2].transpose(0, 3, 1, 2), filmed[3]
        wav = np.random.default_rng(0).normal(0, .1, 16*640).astype(np.float32)

    torch.manual_seed(0)
    expert = frozen(AVHubertExpert(dict(SMALL), shrink=2))
    v, a = embed_stored(expert, Stored)
    faces, marks = tensors(filmed[2], filmed[3])
    torch.testing.assert_close(v, expert.embed_video(faces/255., marks)[0])
    assert not torch.allclose(v, embed_clip(expert, Stored.faces, Stored.wav)[0], atol=1e-4)
    torch.testing.assert_close(embed_stored(expert, Stored, every=3)[0], v[::3])


def test_moving_face_and_landmarks_together_changes_little(filmed):
    "Shift invariance by construction: the warp follows the landmarks (paper B, figure 5)."
    frames, marks, _, _ = filmed
    faces, points = tensors(frames, marks)
    moved = faces.roll(6, -1)
    still, followed = (mouth_input(f, p, aspect=1.) for f, p in ((faces, points), (moved, points + torch.tensor([6., 0.]))))
    torch.testing.assert_close(still, followed, rtol=0, atol=1e-3)
    assert (mouth_input(moved, points, aspect=1.) - still).abs().mean() > .1


# ---- arguments ----

@pytest.mark.parametrize('net, options, words', [
    (dict(dmi=3), {}, "did you mean 'dim'"), (dict(heads=3), {}, 'heads: expected a divisor of dim=32'),
    (dict(conv_pos_groups=5), {}, 'conv_pos_groups: expected a divisor'), (dict(layers=0), {}, 'layers: expected 1'),
    ({}, dict(layer=4), 'layer: expected 1 to 3'), ({}, dict(layer=0), 'layer: expected 1 to 3'), ({}, dict(shrink=3), 'shrink: expected 1, 2 or 4')])
def test_arguments_are_refused_in_words(net, options, words):
    with pytest.raises(ParamsError, match=words): AVHubertExpert({**SMALL, **net}, **options)


def test_streams_and_masks_of_other_sizes_are_refused(net):
    with pytest.raises(InputError, match=r'\(B, T, 104\)'): net.features(torch.zeros(1, 5, 26))
    assert net.features(video=torch.zeros(1, 1, 5, 48, 48)).shape[1] == 5          # the network takes mouths of any size
    with pytest.raises(InputError, match='padding_mask'): net.features(torch.zeros(1, 5, 104), padding_mask=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(InputError, match='at least 1 frame'): mouth_input(torch.zeros(1, 0, 3, 96, 96))


def test_degenerate_landmarks_are_named(filmed):
    faces, marks = tensors(*filmed[2:])
    with pytest.raises(InputError, match='clip 0, frame 0'): mouth_input(faces, torch.full_like(marks, 5.))


def test_a_mouth_does_not_depend_on_the_rest_of_the_batch():
    faces = torch.rand(3, 13, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    one = torch.tensor(ANCHORS)[:, None]*.35
    marks = torch.zeros(68, 2); marks[list(STABLE)] = one[:5, 0]; marks[48:] = one[5, 0]
    marks = torch.stack([marks, marks*2.5, marks*40]).unsqueeze(1).repeat(1, 13, 1, 1)
    together = mouth_input(faces, marks, aspect=1.)
    for at in range(3): assert torch.equal(together[at], mouth_input(faces[at:at + 1], marks[at:at + 1], aspect=1.)[0])


def test_cosines_stay_exact_under_autocast(net):
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast('cpu', torch.bfloat16):
        got, y = net.logits(x), net.final_proj(x).float()
    want = 10*F.normalize(y, dim=-1) @ F.normalize(net.label_embs_concat, dim=-1).T
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_clip_of_padding_alone_is_finite_in_both(net, batch):
    padding = batch[2].clone(); padding[1] = True
    one, other = (f(batch[0], padding_mask=padding) for f in (net.features, lambda *a, **k: plain_features(net, *a, **k)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('frames', [50, 75])
def test_the_position_convolution_is_the_same_in_half_precision(frames, monkeypatch):
    "CPUs with AMX compute grouped convolutions in bfloat16 wrongly (torch 2.13): nine tenths of the value were off."
    torch.manual_seed(0)
    conv, x, seen, convolve = PositionConv(128, 32, 16).eval(), torch.randn(4, 128, frames), [], F.conv1d
    def watched(x, *args, **kwargs): out = convolve(x, *args, **kwargs); seen.append((x.dtype, out.dtype)); return out
    monkeypatch.setattr(F, 'conv1d', watched)
    with torch.no_grad():
        exact = conv(x)
        with torch.autocast('cpu', dtype=torch.bfloat16): mixed = conv(x)
        half = deepcopy(conv).bfloat16()(x.bfloat16())
    for found in (mixed, half): assert (found.float() - exact).norm() < .02*exact.norm()
    assert seen == [(torch.float32, torch.float32)]*3                     # on any CPU, with AMX or without
