"""Exact errors of mouths that are rendered again, what the rows hold, and the rules of the study."""
import numpy as np
import pandas as pd
import pytest

from talkingface.core import InputError, ParamsError
from talkingface.data.clips import ClipStore, prepare
from talkingface.data.corpora import RenderedCorpus
from talkingface.data.video import read_frames
from talkingface.experts.landmarks import LipLandmarker
from talkingface.metrics.lips import LipTracker
from talkingface.metrics.report import Scorers
from talkingface.validity import (BAD, HARMLESS, MOUTHS, VALIDITY_FIELDS, Study, Take, ValidityParams, alarm_difference,
                                  changed_mouth,
                                  correlation_difference, correlations, cut, degraded_rows, evaluate_validity, false_alarms,
                                  lip_error,
                                  middle, mouth_costs, read_validity, reading, save_validity, write_validity)


@pytest.fixture(scope='module')
def corpus(root):
    folder = root/'data'/'corpus'
    if not folder.is_dir(): pytest.skip('no data/corpus: dvc pull')
    return RenderedCorpus(folder)


@pytest.fixture(scope='module')
def store(corpus, tmp_path_factory):
    records = [r for r in corpus if r.split == 'test' and r.text][:4:2]; out = tmp_path_factory.mktemp('validity')/'store'
    prepare(records, out, workers=1)
    return ClipStore(out)


@pytest.fixture(scope='module')
def take(corpus, store): return Take(corpus, store[0])


def test_a_clip_is_rendered_again_as_it_is_in_its_video(corpus, store, take):
    "Head, light and mouth are those of the corpus: what differs from the video is its compression."
    at = slice(40, 46); frames, points = take.play(take.track, at)
    video = read_frames(next(r.video for r in corpus if r.clip == store[0].name))[at]
    assert np.abs(frames.astype(int) - video).mean() < 4 and np.abs(points - take.stored[at]).max() < .1
    faces, inside = take.crops(take.track, at)
    assert np.abs(faces.astype(int) - store[0].faces[at]).mean() < 4 and np.abs(inside - store[0].landmarks[at]).max() < .1


def test_only_the_mouth_changes(take):
    "With another mouth, brows and eyes stay where they are, and so do the pixels of the upper face."
    at = slice(40, 44); right, wrong = (take.crops(t, at) for t in (take.track, changed_mouth(take.track, 'weak', 0)))
    eyes = np.r_[17:27, 36:48]
    assert np.abs(right[1][:, eyes] - wrong[1][:, eyes]).max() < .05 and lip_error(wrong[1], right[1]) > .3
    assert np.array_equal(right[0][:, :, :30], wrong[0][:, :, :30]) and not np.array_equal(right[0], wrong[0])


@pytest.mark.parametrize('name', MOUTHS)
def test_errors_grow_with_the_level(take, name):
    "Parameters alone: more of a change, a larger distance from the true mouth."
    other = take.track[::-1].copy(); how = MOUTHS[name]
    levels = sorted(how.levels, key=lambda v: abs(v - how.neutral))
    far = [np.abs(changed_mouth(take.track, name, v, other) - take.track).mean() for v in (how.neutral, levels[0], levels[-1])]
    assert far[0] < 1e-6 < far[1] < far[2]


def test_another_seed_or_clip_is_refused(corpus, store):
    with pytest.raises(InputError, match='not built with seed 7'): Take(corpus, store[0], 7)
    part = RenderedCorpus(corpus.root, ('words',))
    with pytest.raises(InputError, match='not in the corpus'): Take(part, store[0])


def test_a_late_sound_is_the_error_of_a_late_mouth(store):
    rows = pd.DataFrame([dict(degradation=d, level=v, clip=store[0].name, metric='lse_d[toy]', value=1.)
                         for d, v in (('late', 0), ('late', 4), ('hold', 1), ('hold', 10), ('blur', 2))])
    found = {(r['method'], r['level']): r['lip_error'] for r in degraded_rows(rows, store)}
    assert set(found) == {('late', 0), ('late', 4), ('hold', 1), ('hold', 10)}
    assert found['late', 0] < 1e-3 and found['hold', 1] < 1e-3 and found['late', 4] > .2 and found['hold', 10] > .2


@pytest.fixture(scope='module')
def rows(corpus, store, tmp_path_factory):
    "Whole stage without generated clips: pictures and an untrained landmarker score."
    params = ValidityParams(clips=2, rendered=2, frames=31, metrics=['ssim', 'psnr', 'lmd', 'lse_c'],
                            levels=dict(weak=[.2], late=[], hold=[], jitter=[], other=[.5], shift_x=[8], shift_y=[],
                                        rotation=[], scale=[1.1]))
    tidy = pd.DataFrame([dict(method='ground_truth', seed=0, clip=c.name, metric='ssim', value=1.) for c in store])
    return evaluate_validity({}, tidy, None, None, corpus, store, Scorers(lips=LipTracker(LipLandmarker(8), 'toy')), params,
                             'toy')


def test_the_stage_writes_every_version(rows, store, tmp_path):
    versions = rows[rows['kind'] == 'rendered'].groupby(['method', 'level'])['clip'].nunique()
    assert dict(versions) == {('none', 0): 2, ('weak', .2): 2, ('other', .5): 2, BAD: 2}
    assert set(rows[rows['kind'] == 'harmless']['method']) == {'none', 'shift_x',
                                                               'scale'} and (rows[rows['kind'] == 'harmless']['lip_error'] == 0).all()
    assert set(rows['metric']) == {'ssim', 'psnr',
                                   'lmd'} and tuple(rows) == VALIDITY_FIELDS and (rows['profile'] == 'toy').all()
    error = rows[rows['kind'] == 'rendered'].groupby(['method', 'level'])['lip_error'].mean()
    assert error['none', 0] == 0 < error['other', .5] < error[BAD]
    again = read_validity(write_validity(tmp_path/'validity.csv', rows))
    pd.testing.assert_frame_equal(again, rows, rtol=1e-4, check_dtype=False)


def test_pictures_see_wrong_mouths_and_cry_wolf(rows):
    "SSIM falls with a wrong mouth, and by far more with a shift; PSNR of the truth is infinite and has no alarm."
    found = correlations(rows).set_index(['scope', 'metric'])['within']
    alarms = false_alarms(rows).set_index(['change', 'metric'])
    assert found['rendered', 'ssim'] >= .8 and found['moved', 'ssim'] < found['rendered', 'ssim']
    assert alarms.loc[('shift_x', 'ssim'), 'alarm'] > 1 and alarms.loc[('shift_x', 'psnr'),
        'n'] == 0 and alarms.loc[('shift_x', 'psnr'), 'given'] == 2
    cost = mouth_costs(rows).set_index(['metric', 'change', 'level'])['cost']
    assert cost['ssim', 'other', 1.] == pytest.approx(1) and 0 < cost['ssim', 'other', .5] < 1 and cost['lip_error', 'other',
        1.] == pytest.approx(1)


def toy(metrics, clips=10, noise=0., seed=0):
    "Rendered and shifted versions whose scores follow the error as told: {metric: (weight of the error, change under shift)}."
    draw, out = np.random.default_rng(seed), []
    for clip in range(clips):
        for method, level, error in (('none', 0, 0.), ('weak', .5, 1.), ('late', 4, 2.), ('other', 1, 3.)):
            out += [('toy', 'rendered', method, level, 0, f'c{clip}', m, 1 - w*error/3 + noise*draw.normal(), error) for m,
                    (w, _) in metrics.items()]
        out += [('toy', 'harmless', n, v, 0, f'c{clip}', m, 1 - s*(n != 'none'), 0.) for n,
                v in (('none', 0), ('shift_x', 8)) for m, (_, s) in metrics.items()]
    return pd.DataFrame(out, columns=VALIDITY_FIELDS)


def test_rules_on_made_up_scores(tmp_path):
    rows = toy({'avs_u[corpus]': (.8, .04), 'lse_c[corpus]': (.5, .5)}, noise=1e-9)
    gap = alarm_difference(rows, 'avs_u[corpus]', 'lse_c[corpus]', 'shift_x')
    assert gap['mean'] == pytest.approx(.05 - 1) and gap['high'] < 0 and gap['n'] == 10
    assert correlation_difference(rows, 'avs_u[corpus]', 'lse_c[corpus]', 'rendered')['mean'] == 0
    assert correlation_difference(rows, 'avs_u[corpus]', 'lse_c[corpus]',
                                  'moved')['mean'] > 0     # the shift lies between the wrong mouths for LSE
    told = reading(Study(rows)); assert 'Horizontal shift alone costs' in told and 'AVS_u 0.05, LSE-C 1.00' in told
    files = {p.name for p in save_validity(rows, tmp_path/'fig')}
    assert {'fig.png', 'fig_costs.csv', 'fig_table.md', 'fig_differences.csv', 'fig_reading.md'} <= files


def test_noise_follows_nothing():
    "A metric that is pure noise: the interval over clips holds 0."
    rows = toy({'avs_u[corpus]': (0., 0.)}, clips=16, noise=1.)
    line = correlations(rows).set_index('scope').loc['rendered']
    assert line['low'] < 0 < line['high'] and line['n'] == line['given'] == 16


def test_settings_are_checked():
    with pytest.raises(ParamsError, match='validity.levels'): ValidityParams(levels=dict(wek=[.5]))
    with pytest.raises(InputError, match='at least 2'): ValidityParams(rendered=1)
    assert middle(100, 60) == slice(20, 80) and set(HARMLESS) == {'shift_x', 'shift_y', 'rotation', 'scale'}
