"""IFC, flicker and identity similarity: best at the truth, blind to what they must not see, the same in pieces."""
import numpy as np
import pytest
import torch

from talkingface.core import CheckpointError, InputError, MissingWeights
from talkingface.metrics.temporal import (CSIM, TEMPLATE, FaceEncoder, IFCDiff, IFCFeat, Flicker, VGGStage, align_faces, csim, csim_frames, flicker, flicker_frames,
                                          ifc_diff, ifc_diff_frames, ifc_feat, ifc_feat_frames, load_face_encoder, load_vgg19, step_distances)


@pytest.fixture(scope='module')
def truth():
    "30 frames of a coarse pattern that moves smoothly."
    gen = np.random.default_rng(0); a, b = gen.uniform(40, 210, (2, 3, 8, 8))
    mix = .5 + .5 * np.sin(np.arange(30) / 4)[:, None, None, None]
    return np.repeat(np.repeat(a * mix + b * (1 - mix), 4, -1), 4, -2).round().astype(np.uint8)


def noisy(frames, sigma, seed=0):
    gen = np.random.default_rng(seed)
    return np.clip(frames + gen.normal(0, sigma, frames.shape), 0, 255).round().astype(np.uint8)


def colours(frames):
    "A feature network: mean colour of 16 fields."
    return torch.as_tensor(np.asarray(frames, np.float32).reshape(len(frames), 3, 4, 8, 4, 8).mean((3, 5))).flatten(1)


def test_truth_is_best(truth):
    assert ifc_diff(truth, truth) == 0 and ifc_feat(colours, truth, truth) == 0 and csim(colours, truth, truth) == pytest.approx(1)


@pytest.mark.parametrize('worse', [lambda x: ifc_diff(x[0], x[1]), lambda x: flicker(x[0]), lambda x: ifc_feat(colours, *x),
                                   lambda x: -csim(colours, *x)], ids=['ifc_diff', 'flicker', 'ifc_feat', 'csim'])
def test_noise_makes_it_worse(truth, worse):
    values = [worse((noisy(truth, s), truth)) for s in (3, 8, 20, 50)]
    assert values == sorted(values) and values[0] < values[-1]


def test_symmetry(truth):
    other = noisy(truth, 10)
    assert ifc_diff(other, truth) == pytest.approx(ifc_diff(truth, other))
    assert ifc_feat(colours, other, truth) == pytest.approx(ifc_feat(colours, truth, other))
    assert csim(colours, other, truth) == pytest.approx(csim(colours, truth, other))


def test_what_does_not_change_costs_nothing(truth):
    assert ifc_diff(np.clip(truth, 0, 245) + 10, np.clip(truth, 0, 245)) == 0
    still = np.repeat(truth[:1], 30, 0)
    assert flicker(still) == 0 and ifc_diff(still, truth) > 0
    assert flicker(truth) < 3


def test_values_by_hand():
    zero = np.zeros((4, 3, 2, 2), np.uint8); blink = zero.copy(); blink[1] = 100
    assert ifc_diff_frames(blink, zero).tolist() == [100, 100, 0]
    assert flicker_frames(blink).tolist() == [100, 50]


@pytest.mark.parametrize('frames', [31, 32, 33, 34, 35, 97])
def test_pieces_cover_every_step(frames):
    gen = np.random.default_rng(1); a, b = gen.integers(0, 256, (2, frames, 3, 4, 4), dtype=np.uint8)
    x, y = a.astype(float), b.astype(float)
    whole = np.abs(np.diff(x, axis=0) - np.diff(y, axis=0)).mean((1, 2, 3))
    np.testing.assert_allclose(ifc_diff_frames(a, b), whole, atol=1e-4)
    np.testing.assert_allclose(flicker_frames(a), np.abs(np.diff(x, 2, axis=0)).mean((1, 2, 3)) / 2, atol=1e-4)
    flat = lambda f: torch.as_tensor(np.asarray(f, np.float64).reshape(len(f), -1))
    np.testing.assert_allclose(step_distances(flat, a, piece=13), step_distances(flat, a, piece=1000), atol=1e-12)
    assert len(csim_frames(flat, a, b, piece=50)) == frames


def test_floats_are_the_same_as_bytes(truth):
    other = noisy(truth, 10)
    assert ifc_diff(other / 255, truth / 255) == pytest.approx(ifc_diff(other, truth), abs=1e-4)
    assert flicker(other / np.float32(255)) == pytest.approx(flicker(other), abs=1e-4)


def test_bad_input(truth):
    with pytest.raises(InputError, match='at least 2 frames'): ifc_diff(truth[:1], truth[:1])
    with pytest.raises(InputError, match='at least 3 frames'): flicker(truth[:2])
    with pytest.raises(InputError, match='at least 2 frames'): ifc_feat(colours, truth[:1], truth[:1])
    with pytest.raises(InputError, match='29 frames, truth 30'): ifc_diff(truth[:29], truth)
    with pytest.raises(InputError, match='29 frames, truth 30'): csim(colours, truth[:29], truth)
    with pytest.raises(InputError, match=r'expected features \(n,D\)'): csim(lambda x: torch.zeros(1, 4), truth, truth)
    broken = truth / 255; broken[4] = np.nan
    with pytest.raises(InputError, match='1 of 30 frames hold NaN'): flicker(broken)


def test_vgg_is_that_of_torchvision(tmp_path, monkeypatch):
    "The same numbers as torchvision's network cut after relu3_1; its whole file is taken."
    from torchvision.models.vgg import cfgs, make_layers
    torch.manual_seed(0); net = torch.nn.Module(); net.features = make_layers(cfgs['E'])
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match='vgg19-dcbb9e9d.pth'): load_vgg19()
    torch.save(net.state_dict() | {'classifier.6.bias': torch.zeros(1000)}, tmp_path/'vgg19-dcbb9e9d.pth')
    vgg, faces = load_vgg19(), np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
    with torch.no_grad(): want = net.features[:12]((torch.from_numpy(faces) / 255 - mean) / std).flatten(1)
    assert torch.allclose(vgg(faces), want, atol=1e-5) and 'sha256:' in vgg.protocol
    torch.save({'other': torch.zeros(2)}, tmp_path/'vgg19-dcbb9e9d.pth')
    with pytest.raises(CheckpointError, match='is not vgg19'): load_vgg19()


def test_classes(truth):
    other = noisy(truth, 10)
    for metric, want in ((IFCDiff(), ifc_diff(other, truth)), (IFCFeat(colours), ifc_feat(colours, other, truth)),
                         (CSIM(colours), csim(colours, other, truth))):
        metric.update(other, truth); metric.update(other, truth)
        assert metric.compute().item() == pytest.approx(want)
    metric = Flicker(); metric.update(other)
    assert metric.compute().item() == pytest.approx(flicker(other)) and metric.higher_is_better is False
    assert isinstance(VGGStage(), torch.nn.Module)


def test_face_encoder_reads_its_sizes_from_the_file(tmp_path, monkeypatch, truth):
    torch.manual_seed(0); net = FaceEncoder((1, 2, 1, 1), width=8, dim=16)
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path))
    with pytest.raises(MissingWeights, match='arcface_r50.pth'): load_face_encoder()
    torch.save({k: v for k, v in net.state_dict().items() if 'num_batches' not in k}, tmp_path/'arcface_r50.pth')
    loaded = load_face_encoder(); points = np.random.default_rng(0).uniform(5, 27, (30, 68, 2))
    assert torch.equal(loaded(truth), net(truth)) and loaded(truth, points).shape == (30, 16) and len(loaded.sha256) == 64
    assert csim(loaded, truth, truth) == pytest.approx(1)
    torch.save({'a': torch.zeros(1)}, tmp_path/'arcface_r50.pth')
    with pytest.raises(CheckpointError, match='no iresnet'): load_face_encoder()


def test_faces_are_aligned_wherever_they_stand():
    "The same face turned, moved and larger in the crop looks the same to the encoder."
    import cv2
    face = cv2.GaussianBlur(np.random.default_rng(0).random((112, 112, 3)).astype(np.float32), (0, 0), 6)
    face = (face - face.min()) / (face.max() - face.min())
    points = np.zeros((68, 2)); points[36:42], points[42:48], points[[30, 48, 54]] = TEMPLATE[0], TEMPLATE[1], TEMPLATE[2:]
    want = align_faces(torch.from_numpy(face.transpose(2, 0, 1)[None]), points[None], aspect=1.)
    assert torch.allclose(want, torch.from_numpy(face.transpose(2, 0, 1)[None]), atol=1e-4)
    for angle, scale in ((20, 1.2), (-15, 1.5), (5, .9)):
        turn = cv2.getRotationMatrix2D((56, 56), angle, scale); turn[:, 2] += 40
        moved = cv2.warpAffine(face, turn, (192, 192), flags=cv2.INTER_CUBIC)
        at = points @ turn[:, :2].T + turn[:, 2]
        got = align_faces(torch.from_numpy(np.ascontiguousarray(moved.transpose(2, 0, 1)))[None], at[None], aspect=1.)
        assert (got - want)[..., 10:-10, 10:-10].abs().max() < .03
