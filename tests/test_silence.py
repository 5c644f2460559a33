"""Silent segments, the mouth in them, and the share of the reference's mouth in the output."""
import numpy as np
import pytest

from talkingface.core import InputError
from talkingface.metrics.silence import (LipFollow, LipLeak, SilentAperture, SilentExcess, SilentVariance, frame_rms, is_silent,
                                         leak_coefficients, leak_sums, lip_leak, silent_segments, silent_values)


def sound(*parts, seed=0):
    "Noise: (frames, RMS), ..."
    gen = np.random.default_rng(seed)
    return np.concatenate([gen.normal(0, level, 640 * frames) for frames, level in parts]).astype(np.float32)


def mouth(opening):
    points = np.zeros((len(opening), 20, 2)); points[:, 17:20, 1] = np.asarray(opening)[:, None]
    return points


def test_segments():
    assert silent_segments(sound((20, .1), (30, .0001), (20, .1))) == [slice(23, 47)]
    assert silent_segments(sound((30, .0001), (20, .1))) == [slice(0, 27)]            # the start of a clip borders on nothing
    assert silent_segments(sound((20, .1), (30, .0001))) == [slice(23, 50)]
    assert silent_segments(sound((40, .1))) == [] and silent_segments(sound((5, 0))) == [] and silent_segments(np.zeros(0)) == []
    assert silent_segments(np.zeros(640 * 12)) == [slice(0, 12)]


def test_noise_floor_counts_as_quiet_relative_to_speech():
    "Room noise 40 dB below loud speech is silence, 20 dB below is not."
    assert silent_segments(sound((60, .3), (30, .3 / 100), (20, .3))) == [slice(63, 87)]
    assert silent_segments(sound((60, .3), (30, .3 / 10), (20, .3))) == []


def test_is_silent_agrees_with_frames():
    assert is_silent(sound((10, .001))) and not is_silent(sound((10, .001), (1, .1))) and is_silent(np.zeros(100))
    assert frame_rms(np.full(1280, .5)).tolist() == [.5, .5]


def test_values_by_hand():
    truth, open_ = np.ones(40), np.full(40, 3.)
    at = [slice(0, 10), slice(20, 40)]
    assert silent_values(open_, truth, at) == dict(aperture=2., excess=2., variance=0., frames=30)
    assert silent_values(truth, open_, at)['excess'] == -2
    trembling = np.where(np.arange(40) % 2, 2., 0.)
    assert silent_values(trembling, truth, at) == pytest.approx(dict(aperture=1., excess=0., variance=1., frames=30))
    valid = np.arange(40) < 30
    assert silent_values(open_, truth, at, valid)['frames'] == 20
    with pytest.raises(InputError, match='no silent segment'): silent_values(open_, truth, [])
    with pytest.raises(InputError, match='no silent segment'): silent_values(open_, truth, at, np.zeros(40, bool))
    with pytest.raises(InputError, match='one length'): silent_values(open_, truth[:9], at)


def test_growing_faults_grow():
    truth, at = np.ones(40), [slice(0, 40)]
    ajar = [silent_values(truth + d, truth, at)['aperture'] for d in (0, .5, 1, 4)]
    moves = [silent_values(truth + d * np.sin(np.arange(40)), truth, at)['variance'] for d in (0, .5, 1, 4)]
    assert ajar == sorted(ajar) and ajar[0] == 0 and moves == sorted(moves) and moves[0] == 0


def clips_of(leak, follow=None, clips=30, frames=40, noise=.2, seed=0):
    gen = np.random.default_rng(seed); follow = 1 - leak if follow is None else follow; out = []
    for _ in range(clips):
        wanted, shown = 4 + 3 * np.sin(np.arange(frames) / 3 + gen.uniform(0, 6)), np.full(frames, gen.uniform(0, 8))
        out.append((follow * wanted + leak * shown + gen.normal(0, noise, frames), wanted, shown))
    return out


@pytest.mark.parametrize('leak, follow', [(0, 1), (.3, .7), (.5, .2), (1, 0), (0, 0)])
def test_leak_comes_back(leak, follow):
    found = lip_leak([leak_sums(*c) for c in clips_of(leak, follow)])
    assert found['leak'] == pytest.approx(leak, abs=.03) and found['follow'] == pytest.approx(follow, abs=.03)
    assert found['low'] - .02 <= leak <= found['high'] + .02 and found['clips'] == 30 and found['frames'] == 1200


def test_leak_equals_least_squares():
    clips = clips_of(.3); y, a, r = (np.concatenate(c) for c in zip(*clips))
    want = np.linalg.lstsq(np.stack([a, r, np.ones_like(a)], 1), y, rcond=None)[0]
    assert lip_leak([leak_sums(*c) for c in clips])['leak'] == pytest.approx(want[1], abs=1e-9)


def test_leak_is_seeded_and_order_free_in_its_value():
    sums = [leak_sums(*c) for c in clips_of(.3)]
    assert lip_leak(sums) == lip_leak(sums) and lip_leak(sums, seed=1)['low'] != lip_leak(sums)['low']
    assert lip_leak(sums[::-1])['leak'] == pytest.approx(lip_leak(sums)['leak'], abs=1e-12)


def test_leak_that_cannot_be_told():
    still = np.ones(20); moving = np.sin(np.arange(20.))
    assert np.isnan(lip_leak([leak_sums(still, still, still)])['leak'])
    assert np.isnan(lip_leak([leak_sums(moving, moving, moving)])['leak'])            # target and reference are the same
    assert np.isnan(leak_coefficients(leak_sums(moving[:2], moving[:2], still[:2]))[0])
    with pytest.raises(InputError, match='at least one clip'): lip_leak([])
    with pytest.raises(InputError, match='one length'): leak_sums(still, still, still[:3])
    gone = moving.copy(); gone[3] = np.nan
    assert leak_sums(gone, moving, moving)['frames'] == 19


def test_classes():
    wav = sound((20, .1), (30, .0001), (20, .1)); truth, ajar = np.ones(70), np.full(70, 3.)
    for cls, want in ((SilentAperture, 2), (SilentExcess, 2), (SilentVariance, 0)):
        metric = cls(); metric.update(mouth(ajar), mouth(truth), wav); metric.update(mouth(ajar), mouth(truth), sound((70, .1)))
        assert metric.compute().item() == pytest.approx(want) and metric.left_out.item() == 1
    leak, follow, clips = LipLeak(), LipFollow(), [c for c in clips_of(.4, noise=0)]
    for clip in clips:
        for metric in (leak, follow): metric.update(*(mouth(np.abs(x)) for x in clip))
    want = leak_coefficients({k: sum(leak_sums(*map(np.abs, c))[k] for c in clips) for k in ('frames', 'xx', 'xy', 'yy')})
    assert (leak.compute().item(), follow.compute().item()) == pytest.approx(want) and want == pytest.approx((.4, .6), abs=.05)
