"""Published layouts: the state dicts load strictly, and the reference's numbers come out."""
import numpy as np
import pytest
import torch

from goldens import FOLDER, compare, det_array, det_state, load_golden, load_manifest
from talkingface.experts.avsyncnet import ResNetSE34L, ResNetSE34V2
from talkingface.data.audio import mfcc
from talkingface.experts.base import embed_clip, face_windows
from talkingface.experts.syncnet import SyncNet, SyncNetV2
from talkingface.losses.adversarial import QualityDiscriminator
from talkingface.metrics.sync import lse, lse_distances
from talkingface.weights import load_published

torch.set_num_threads(1)


def load_like(net, manifest):
    "Load regenerated weights of the manifest's keys and shapes with strict=True."
    shapes = load_manifest(manifest)
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == {
        key: shape for key, shape in shapes.items() if not key.startswith('torchfb.')}
    state = {key: torch.from_numpy(np.array(det_array(key, shape, gain=1.))) for key, shape in shapes.items()}
    net.load_state_dict(state, strict=True)
    return net.eval()


PUBLISHED = [(SyncNet, 'wav2lip_syncnet_color'), (QualityDiscriminator, 'wav2lip_disc_qual'), (SyncNetV2, 'syncnet_python_S'),
             (ResNetSE34L, 'resnetse34L'), (lambda: ResNetSE34V2(mels=64), 'resnetse34V2')]


@pytest.mark.parametrize('make, manifest', PUBLISHED)
def test_manifest_loads_strictly(make, manifest): load_like(make(), manifest)


def faces_of(stacked: np.ndarray) -> torch.Tensor:
    "The golden's 15 BGR lower-half channels as whole RGB faces; the upper half is noise that must not matter."
    lower = torch.from_numpy(stacked).float().div(255).unflatten(1, (5, 3)).flip(2)
    return torch.cat([torch.rand_like(lower), lower], -2)


@pytest.fixture(scope='module')
def syncnet():
    golden = load_golden('wav2lip_syncnet_color')
    net = SyncNet().eval()
    net.load_state_dict(det_state(golden), strict=True)
    return golden, net


@torch.no_grad()
def test_syncnet_color(syncnet):
    golden, net = syncnet
    faces, mel = faces_of(golden.inputs['faces_u8']), torch.from_numpy(golden.inputs['mel'])
    v, a = net(faces, mel[:, 0])
    worst = compare(golden, dict(
        face_raw=net.encode_faces(face_windows(faces)[:, 0]), audio_raw=net.encode_mel(mel),
        face_emb=v[:, 0], audio_emb=a[:, 0], cosine=net.similarity(v, a)[:, 0]))
    print(worst)
    assert len(worst) == 5


@torch.no_grad()
def test_published_file_of_syncnet_color(syncnet, tmp_path):
    "A file as Wav2Lip publishes it (wrapped, `module.` before each key, optimiser and counters beside) loads strictly."
    golden, _ = syncnet
    state = {f'module.{key}': value for key, value in det_state(golden).items()}
    torch.save({'state_dict': state, 'optimizer': {'state': {}, 'param_groups': []}, 'global_step': 7, 'global_epoch': 1},
               tmp_path/'expert.pth')
    net = SyncNet().eval()
    net.load_state_dict(load_published(tmp_path/'expert.pth'), strict=True)
    v, a = net(faces_of(golden.inputs['faces_u8']), torch.from_numpy(golden.inputs['mel'])[:, 0])
    assert set(compare(golden, dict(cosine=net.similarity(v, a)[:, 0]), only=('cosine',))) == {'cosine'}


@torch.no_grad()
def test_syncnet_color_channels_last(syncnet):
    golden, _ = syncnet
    net = SyncNet().eval().to(memory_format=torch.channels_last)
    net.load_state_dict(det_state(golden), strict=True)
    v, a = net(faces_of(golden.inputs['faces_u8']), torch.from_numpy(golden.inputs['mel'])[:, 0])
    compare(golden, dict(face_emb=v[:, 0], audio_emb=a[:, 0]), only=('face_emb', 'audio_emb'))


@torch.no_grad()
@pytest.mark.parametrize('broken', ['rgb', 'upper half', 'one weight', 'one bias'])
def test_golden_notices(syncnet, broken):
    "The comparison is not blind: a wrong channel order, a wrong half or 5 % on one tensor fails it."
    golden, net = syncnet
    faces = faces_of(golden.inputs['faces_u8'])
    if broken == 'rgb': faces = faces.flip(2)
    if broken == 'upper half': faces = torch.roll(faces, 48, -2)
    state = det_state(golden)
    key = {'one weight': 'face_encoder.9.conv_block.0.weight', 'one bias': 'face_encoder.0.conv_block.1.bias'}.get(broken)
    if key:
        state[key] = state[key]*(1 + .05*torch.randn(state[key].shape, generator=torch.Generator().manual_seed(0)))
        net = SyncNet().eval(); net.load_state_dict(state)
    with pytest.raises(AssertionError, match='face_emb differs'):
        compare(golden, dict(face_emb=net.embed_video(faces)[:, 0]), only=('face_emb',))


def v2_outputs(net, power) -> dict:
    maps = net.maps(net.normalise(power))
    return dict(net_input=net.normalise(power)[:, None], layer4_mean=maps.mean(-1), pooled=net.pool(maps),
                emb=net(power, power=True))


@torch.no_grad()
def test_resnetse34_v2():
    golden = load_golden('resnetse34V2')
    net = ResNetSE34V2(mels=64).eval()
    net.load_state_dict(det_state(golden), strict=True)
    worst = compare(golden, v2_outputs(net, torch.from_numpy(golden.inputs['mel_power'])))
    print(worst)
    assert len(worst) == 4


@torch.no_grad()
@pytest.mark.parametrize('key', ['conv1.bias', 'layer2.0.se.fc.2.weight', 'layer3.5.bn1.running_mean', 'attention.0.weight'])
def test_golden_of_resnetse34_v2_notices(key):
    golden = load_golden('resnetse34V2')
    net, state = ResNetSE34V2(mels=64).eval(), det_state(golden)
    state[key] = state[key]*(1 + .05*torch.randn(state[key].shape, generator=torch.Generator().manual_seed(0)))
    net.load_state_dict(state)
    with pytest.raises(AssertionError, match='emb differs'):
        compare(golden, v2_outputs(net, torch.from_numpy(golden.inputs['mel_power'])))


def batch_norm(state, key, x):
    shape = (1, -1) + (1,)*(x.ndim - 2)
    mean, var, weight, bias = (state[f'{key}.{part}'].view(shape) for part in ('running_mean', 'running_var', 'weight', 'bias'))
    return (x - mean)/(var + 1e-5).sqrt()*weight + bias


def se_stages(state, x, strides):
    "The four stages of ResNetSE-34, block by block, from the facts: conv, relu, norm, conv, norm, excitation, sum, relu."
    for stage, (blocks, stride) in enumerate(zip((3, 4, 6, 3), strides), 1):
        for key in (f'layer{stage}.{i}' for i in range(blocks)):
            step = stride if key.endswith('.0') else 1
            y = batch_norm(state, f'{key}.bn1', torch.conv2d(x, state[f'{key}.conv1.weight'], None, step, 1).relu())
            y = batch_norm(state, f'{key}.bn2', torch.conv2d(y, state[f'{key}.conv2.weight'], None, 1, 1))
            squeezed = (y.mean((2, 3)) @ state[f'{key}.se.fc.0.weight'].T + state[f'{key}.se.fc.0.bias']).relu()
            gate = (squeezed @ state[f'{key}.se.fc.2.weight'].T + state[f'{key}.se.fc.2.bias']).sigmoid()
            if f'{key}.downsample.0.weight' in state:
                x = batch_norm(state, f'{key}.downsample.1', torch.conv2d(x, state[f'{key}.downsample.0.weight'], None, step))
            x = (y*gate[..., None, None] + x).relu()
    return x


@torch.no_grad()
def test_resnetse34_l_formula():
    "The light layout in float64, step by step: stem conv-norm-relu, stages 1 2 2 1, mean over frequency, SAP over time."
    net = load_like(ResNetSE34L(), 'resnetse34L').double()
    power = torch.rand(2, 40, 57, dtype=torch.double, generator=torch.Generator().manual_seed(0))**4*500
    state, level = net.state_dict(), (power + 1e-6).log()
    x = (level - level.mean(2, keepdim=True))/(level.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = batch_norm(state, 'bn1', torch.conv2d(x[:, None], state['conv1.weight'], None, (2, 1), 3)).relu()
    x = se_stages(state, x, (1, 2, 2, 1)).mean(2)
    scores = torch.stack([torch.tanh(state['sap_linear.weight'] @ column + state['sap_linear.bias'][:, None]).T
                          @ state['attention'][:, 0] for column in x])
    pooled = (x*(scores.exp()/scores.exp().sum(1, keepdim=True))[:, None]).sum(2)
    torch.testing.assert_close(net(power, power=True), pooled @ state['fc.weight'].T + state['fc.bias'])


def test_published_file_of_resnetse34(tmp_path):
    "`__S__.` before each key, a loss head and front-end buffers beside: taken off, the rest loads strictly."
    state = {key: torch.from_numpy(np.array(det_array(key, shape))) for key, shape in load_manifest('resnetse34L').items()}
    torch.save({**{f'__S__.{key}': value for key, value in state.items()}, '__L__.w': torch.ones(1)}, tmp_path/'ap.model')
    found = load_published(tmp_path/'ap.model')
    net = ResNetSE34L()
    net.load_state_dict({k.removeprefix('__S__.'): v for k, v in found.items() if not k.startswith('__L__.')}, strict=True)
    assert torch.equal(net.fc.weight, state['fc.weight']) and len(state) == 287


# the columns of syncnet_v2: stride, padding, and size, stride, padding of the max pool after a convolution
LIPS = {0: ((1, 2, 2), 0, (3, 2, 0)), 4: ((1, 2, 2), (0, 1, 1), (3, 2, 1)), 8: (1, (0, 1, 1), None), 11: (1, (0, 1, 1), None),
        14: (1, (0, 1, 1), (3, 2, 0)), 18: (1, 0, None)}
SOUND = {0: (1, None), 4: (1, ((3, 3), (1, 2))), 8: (1, None), 11: (1, None), 14: (1, ((3, 3), (2, 2))), 18: (0, None)}


def head(state, key, x):
    x = x.flatten(1) @ state[f'{key}.0.weight'].T + state[f'{key}.0.bias']
    return batch_norm(state, f'{key}.1', x).relu() @ state[f'{key}.3.weight'].T + state[f'{key}.3.bias']


@torch.no_grad()
def test_syncnet_v2_formula():
    "Both columns against functional calls with the manifest's weights; frames arrive as an image reader gives them (BGR uint8)."
    net = load_like(SyncNetV2(), 'syncnet_python_S')
    state, draw = net.state_dict(), torch.Generator().manual_seed(0)
    bgr = torch.randint(256, (6, 224, 224, 3), generator=draw, dtype=torch.uint8)
    x = torch.stack([bgr[i:i + 5].float().permute(3, 0, 1, 2) for i in range(2)])
    for i, (stride, padding, pool) in LIPS.items():
        x = torch.conv3d(x, state[f'netcnnlip.{i}.weight'], state[f'netcnnlip.{i}.bias'], stride, padding)
        x = batch_norm(state, f'netcnnlip.{i + 1}', x).relu()
        if pool: x = torch.max_pool2d(x[:, :, 0], *pool)[:, :, None]
    faces = bgr.flip(-1).permute(0, 3, 1, 2)[None]/255
    torch.testing.assert_close(net.raw_video(faces)[0], head(state, 'netfclip', x), atol=1e-3, rtol=1e-4)
    cepstra = torch.randn(1, 13, 27, generator=draw)*10
    x = torch.stack([cepstra[:, :, 4*f:4*f + 20] for f in range(2)])
    for i, (padding, pool) in SOUND.items():
        x = torch.conv2d(x, state[f'netcnnaud.{i}.weight'], state[f'netcnnaud.{i}.bias'], 1, padding)
        x = batch_norm(state, f'netcnnaud.{i + 1}', x).relu()
        if pool: x = torch.max_pool2d(x, *pool)
    torch.testing.assert_close(net.raw_audio(cepstra)[0], head(state, 'netfcaud', x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lse_of_a_clip_step_by_step():
    "From BGR uint8 frames and 16-bit samples as the published script goes, window by window, against `embed_clip` and `lse`."
    net, draw, frames = load_like(SyncNetV2(), 'syncnet_python_S'), torch.Generator().manual_seed(0), 9
    bgr = torch.randint(256, (frames, 224, 224, 3), generator=draw, dtype=torch.uint8)
    samples = (torch.randn(640*frames, generator=draw)*3000).to(torch.int16)
    cepstra, volume = torch.from_numpy(mfcc(samples.numpy())).float(), bgr.float().permute(3, 0, 1, 2)
    last = min(frames, len(samples)//640) - 5
    lips = torch.stack([net.netfclip(net.netcnnlip(volume[None, :, f:f + 5]).flatten(1))[0] for f in range(last)])
    sound = torch.stack([net.netfcaud(net.netcnnaud(cepstra[None, None, :, 4*f:4*f + 20]).flatten(1))[0] for f in range(last)])
    padded = torch.cat([torch.zeros(15, 1024), sound, torch.zeros(15, 1024)])
    table = torch.stack([torch.pairwise_distance(lips[i].expand(31, -1), padded[i:i + 31]) for i in range(last)])
    mean = table.mean(0)
    net.chunk = 3                                                       # as in long clips
    got = lse(lse_distances(*embed_clip(net, bgr.flip(-1).permute(0, 3, 1, 2), samples, raw=True)))
    assert got.distance == pytest.approx(mean.min().item(), rel=1e-5)
    assert got.confidence == pytest.approx((mean.median() - mean.min()).item(), rel=1e-3)
    assert got.offset == 15 - mean.argmin().item()


@torch.no_grad()
def test_quality_discriminator_formula():
    "The frame-wise layout against functional calls with the manifest's weights (float64), and one logit per frame in order."
    net = load_like(QualityDiscriminator(), 'wav2lip_disc_qual').double()
    faces = torch.rand(1, 2, 3, 96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    state, x = net.state_dict(), faces[0, :, :, 48:].flip(1)
    strides = {'0.0': (1, 3), '1.0': ((1, 2), 2), '1.1': (1, 2), '2.0': (2, 2), '2.1': (1, 2), '3.0': (2, 2),
               '3.1': (1, 2), '4.0': (2, 1), '4.1': (1, 1), '5.0': (2, 1), '5.1': (1, 1), '6.0': (1, 0), '6.1': (1, 0)}
    for block, (stride, padding) in strides.items():
        key = f'face_encoder_blocks.{block}.conv_block.0'
        x = torch.conv2d(x, state[f'{key}.weight'], state[f'{key}.bias'], stride, padding)
        x = torch.where(x > 0, x, .01*x)
    want = torch.conv2d(x, state['binary_pred.0.weight'], state['binary_pred.0.bias']).flatten()
    torch.testing.assert_close(net(faces)[0], want)


def test_weights_are_checked():
    golden = load_golden('wav2lip_syncnet_color')
    golden.meta['weights']['params']['face_encoder.0.conv_block.0.bias']['sha'] = '0'*16
    with pytest.raises(AssertionError, match='face_encoder.0.conv_block.0.bias'): det_state(golden)
    assert FOLDER.is_dir()
