"""Published layouts: the state dicts load strictly, and the reference's numbers come out."""
import numpy as np
import pytest
import torch

from goldens import FOLDER, compare, det_array, det_state, load_golden, load_manifest
from talkingface.experts.base import face_windows
from talkingface.experts.syncnet import SyncNet
from talkingface.losses.adversarial import QualityDiscriminator
from talkingface.weights import load_published

torch.set_num_threads(1)


def load_like(net, manifest):
    "Load regenerated weights of the manifest's keys and shapes with strict=True."
    shapes = load_manifest(manifest)
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == shapes
    state = {key: torch.from_numpy(np.array(det_array(key, shape, gain=1.))) for key, shape in shapes.items()}
    net.load_state_dict(state, strict=True)
    return net.eval()


@pytest.mark.parametrize('make, manifest', [(SyncNet, 'wav2lip_syncnet_color'), (QualityDiscriminator, 'wav2lip_disc_qual')])
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
