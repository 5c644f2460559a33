"""AVS: cosines of AV-HuBERT's passes, the passes of the expert itself, and pieces of long clips."""
import numpy as np
import pytest
import torch

from talkingface.core import InputError
from talkingface.experts.avhubert import TINY, AVHubertExpert
from talkingface.metrics.avs import AVSM, AVSU, AVSV, AVScorer, avs, avs_frames


@pytest.fixture(scope='module')
def expert():
    torch.manual_seed(0)
    return AVHubertExpert(TINY | dict(layers=2), shrink=2).eval()


@pytest.fixture(scope='module')
def clip():
    "40 frames, their sound, and the landmarks of an upright face that drifts."
    gen = np.random.default_rng(0)
    faces = gen.integers(0, 256, (40, 3, 96, 96), dtype=np.uint8)
    wav = (gen.normal(size=40 * 640) * .1).astype(np.float32)
    points = gen.uniform(20, 76, (1, 68, 2)) + gen.uniform(-1, 1, (40, 68, 2))
    return faces, wav, points.astype(np.float32)


def test_avs_arithmetic():
    a = torch.tensor([[1., 0], [0, 2], [3, 3]])
    b = torch.tensor([[2., 0], [0, -1], [1, 0]])
    assert torch.allclose(avs_frames(a, b), torch.tensor([1, -1, .5 ** .5], dtype=torch.float64))
    assert avs(a, b) == pytest.approx(.5 ** .5 / 3) and avs(b, a) == avs(a, b) and avs(a, 7 * a) == pytest.approx(1)
    assert avs(a.half(), b.half()) == pytest.approx(avs(a, b), abs=1e-3)
    for wrong in (a[:2], a[:, :1], a[0], a[:0]):
        with pytest.raises(InputError, match='one shape'): avs(a, wrong)


def test_passes_are_those_of_the_expert(expert, clip):
    faces, wav, points = clip
    got = AVScorer(expert, 'x')(faces, wav, points)
    with torch.no_grad():
        unit, rows, where = torch.from_numpy(faces)[None] / 255, expert.audio_features(torch.from_numpy(wav)[None]), torch.from_numpy(points)[None]
        wanted = dict(audio=expert.embed_audio(rows), video=expert.embed_video(unit, where), joint=expert.embed_joint(unit, rows, where))
    for stream, want in wanted.items(): assert torch.allclose(got[stream], want[0], atol=1e-5), stream


@pytest.mark.parametrize('layer', [None, 1])
def test_layers_and_streams(expert, clip, layer):
    faces, wav, points = clip
    other = AVHubertExpert(TINY | dict(layers=2), layer=layer, shrink=2); other.load_state_dict(expert.state_dict())
    scorer = AVScorer(other, 'x')
    assert ('last layer' if layer is None else 'layer 1') in scorer.protocol
    alone = scorer(faces, landmarks=points, streams=['video'])
    assert list(alone) == ['video'] and torch.allclose(alone['video'], scorer(faces, wav, points)['video'], atol=1e-6)
    assert torch.allclose(scorer(None, wav, streams=['audio'])['audio'], scorer(faces, wav, points)['audio'], atol=1e-6)


def test_pieces_with_context_come_close_to_one_pass(expert, clip):
    faces, wav, points = clip
    whole, pieces = AVScorer(expert, 'x')(faces, wav, points), AVScorer(expert, 'x', piece=10, context=12)(faces, wav, points)
    for stream in whole:
        assert whole[stream].shape == pieces[stream].shape
        assert avs(whole[stream], pieces[stream]) > .98, stream
    no_context = AVScorer(expert, 'x', piece=10, context=0)(faces, wav, points)
    assert avs(whole['video'], no_context['video']) < avs(whole['video'], pieces['video'])


def test_memory_mapped_and_float_frames(expert, clip, tmp_path):
    faces, wav, points = clip
    np.save(tmp_path/'faces.npy', faces)
    mapped = np.load(tmp_path/'faces.npy', mmap_mode='r')
    scorer = AVScorer(expert, 'x'); want = scorer(faces, wav, points)['joint']
    assert torch.equal(scorer(mapped, wav, points)['joint'], want)
    assert torch.allclose(scorer(faces / np.float32(255), wav, points)['joint'], want, atol=1e-5)


def test_bad_input(expert, clip):
    faces, wav, points = clip; scorer = AVScorer(expert, 'x')
    with pytest.raises(InputError, match='fit_length'): scorer(faces, wav[:-1], points)
    with pytest.raises(InputError, match='39 frames of landmarks'): scorer(faces, wav, points[:39])
    with pytest.raises(InputError, match='need sound'): scorer(faces)
    with pytest.raises(InputError, match="expected some of"): scorer(faces, wav, points, ['picture'])
    with pytest.raises(InputError, match='at least one frame'): scorer(faces[:0], wav[:0], points[:0])
    with pytest.raises(InputError, match='NaN'): scorer(faces, wav, np.full_like(points, np.nan))


def test_classes_are_means_of_the_function(expert, clip):
    faces, wav, points = clip; scorer = AVScorer(expert, 'x')
    true, moved = scorer(faces, wav, points), scorer(np.roll(faces, 3, 0), wav, points)
    for cls, pairs in ((AVSU, [(true['audio'], true['video']), (moved['audio'], moved['video'])]),
                       (AVSM, [(moved['joint'], true['joint'])]), (AVSV, [(moved['video'], true['video'])])):
        metric = cls()
        for pair in pairs: metric.update(*pair)
        assert metric.compute().item() == pytest.approx(np.mean([avs(*p) for p in pairs])) and metric.higher_is_better
