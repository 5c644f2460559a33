"""Exact errors of mouths that are rendered again, what the rows hold, and the rules of the study."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from talkingface.core import InputError, ParamsError, derive_seed
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
                                  in_short, middle, mouth_costs, read_validity, reading, save_validity, validity_figure,
                                  write_validity, _built_with, _outcome, _verdicts)


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


def test_the_best_of_all_metrics_is_named():
    "A metric outside AVS and LSE that wins is called the best; those that are asked about are told beside it."
    rows = toy({'avs_u[corpus]': (-.3, .9), 'lse_c[corpus]': (-.5, .9), 'ssim': (.8, .01), 'aperture_correlation': (.2, .9)}, noise=.05)
    told = next(t for t in reading(Study(rows)).split('\n\n') if t.startswith('Among clips rendered'))
    assert 'SSIM follows the exact lip error best of 4 metrics (1.00' in told and told.count('SSIM') == 1
    assert all(name in told for name in ('AVS_u −', 'LSE-C −', 'Opening corr. 0.'))
    alone = reading(Study(rows[rows['metric'] == 'ssim'])); assert 'SSIM follows the exact lip error best (1.00' in alone


def test_metrics_that_tie_with_the_best_are_told():
    rows = toy({'avs_u[corpus]': (.8, 0.), 'psnr': (.8, 0.), 'lse_c[corpus]': (-.5, 0.)}, noise=1e-9)
    told = reading(Study(rows))
    assert 'not to be told apart from PSNR by' in told or 'not to be told apart from AVS_u by' in told
    assert 'reversed under LSE-C' in told and 'apart from LSE-C' not in told


def moves(rows, levels, name='shift_x', step=.001):
    "The same rows with as many levels of a move as told, scored alike but for a step."
    base = rows[(rows['kind'] == 'harmless') & (rows['method'] == 'shift_x')]
    more = [base.assign(method=name, level=float(v + 1), value=base['value'] - step*v) for v in range(levels)]
    return pd.concat([rows[(rows['kind'] != 'harmless') | (rows['method'] != 'shift_x')], *more], ignore_index=True)


@pytest.mark.parametrize('alarm', [0., .1, .4, 2.])
def test_how_many_moves_are_listed_does_not_decide(alarm):
    "One level of a shift or forty that are scored alike: the same correlation, where unweighted ranks would differ."
    rows = toy({'avs_u[corpus]': (.8, alarm)}, noise=1e-9)
    found = [correlations(moves(rows, n, step=0.)).set_index('scope').loc['moved', ['within', 'means']] for n in (1, 4, 40)]
    assert np.ptp([f['within'] for f in found]) < 1e-9 and np.ptp([f['means'] for f in found]) < 1e-9
    both = moves(pd.concat([rows, moves(rows, 30, 'scale', 0.).query("method == 'scale'")]), 1, step=0.)
    assert correlations(both).set_index('scope').loc['moved', 'within'] == pytest.approx(found[0]['within'])


def test_a_move_that_looks_like_bad_lips_costs_the_order():
    "Wrong mouths and moves weigh the same: calm 1, far off below 0; `rendered` does not change; without moves there is nothing."
    found = [correlations(toy({'avs_u[corpus]': (.8, alarm)}, noise=1e-9)).set_index('scope')['within'] for alarm in (0., 2.)]
    assert found[0]['moved'] > .9 and found[1]['moved'] < 0 and found[0]['rendered'] == found[1]['rendered'] == pytest.approx(1)
    still = toy({'avs_u[corpus]': (.8, 0.)}); still = still[still['method'] != 'shift_x']
    assert np.isnan(correlations(still).set_index('scope').loc['moved', 'within'])


def reader(floor, spread):
    "Generated versions whose errors lie apart as told, and true pictures that are read with an error."
    out = [('toy', 'generated', f'row{i}', 0, 0, f'c{c}', 'lse_c[corpus]', -i, 1 + spread*i) for i in range(3) for c in range(4)]
    out += [('toy', 'truth', 'ground_truth', 0, 0, f'c{c}', 'lse_c[corpus]', 1, floor) for c in range(4)]
    return pd.DataFrame(out, columns=VALIDITY_FIELDS)


def test_the_floor_of_the_reader_stands_beside_the_spread():
    told = reading(Study(reader(.5, .1)))
    assert '0.50 px: no smaller than the 0.10 px' in told and 'near what the reader can tell' in told
    told = reading(Study(reader(.05, .2)))
    assert '0.05 px: smaller than the 0.20 px' in told and 'near what the reader can tell' not in told
    lips = toy({'avs_u[corpus]': (.8, .04)}); assert 'landmarker' not in reading(Study(lips))


def pairs(signs, measure='correlation', scope='rendered', other='lse_c[corpus]'):
    "Lines of `differences` whose intervals lie above 0, below it, or about it."
    return pd.DataFrame([dict(measure=measure, scope=scope, metric='avs_u', other=other, mean=.5*s, low=.5*s - .1 - .2*(s == 0),
                              high=.5*s + .1 + .2*(s == 0), n=9) for s in signs])


@pytest.mark.parametrize('signs, up', [((1, 1, 1, 0), 1), ((-1, -1, -1, 1), -1), ((1, 1, -1, -1), 0), ((1, 1, 0, 0), 0), ((0, 0), 0)])
def test_most_pairs_decide_and_a_half_does_not(signs, up):
    "Of false alarms less is better: the same intervals say the opposite. Pairs with LMD do not enter."
    beside = pairs((-up,)*9, other='lmd')
    assert _outcome(pd.concat([pairs(signs), beside]), 'rendered', 'correlation') == up
    assert _outcome(pairs(signs, 'false alarm', 'scale'), 'scale', 'false alarm') == -up


@pytest.mark.parametrize('signs, word', [((1, 1), 'better than'), ((-1, -1), 'worse than'), ((1, -1), 'about as well as')])
def test_the_sentence_in_short(signs, word):
    gaps = pd.concat([pairs(signs), pairs((-1, -1), scope='generated'), pairs((-1,), 'false alarm', 'shift_x'),
                      pairs((1,), 'false alarm', 'scale'), pairs((1,), 'false alarm', 'rotation')])
    assert in_short(gaps) == (f'In short: where a mouth is plainly wrong AVS follow the exact lip error {word} LSE, and among the small '
                              'errors of generators AVS follow the exact lip error worse than LSE; when a face only moves they keep '
                              'calmer than LSE under 1, less calm under 2 and alike under 0 of 3 kinds of move.')
    assert in_short(pairs(signs)) == f'In short: where a mouth is plainly wrong AVS follow the exact lip error {word} LSE.'
    assert in_short(pairs(signs, other='lmd')) == ''


def test_verdicts_count_pairs():
    gaps = pd.concat([pairs((1, 1, 0)), pairs((-1,), other='lmd'), pairs((1, -1), 'false alarm', 'scale'),
                      pairs((1, 1), scope='degraded')])
    assert _verdicts(gaps) == [
        'AVS in following the error (rendered with wrong mouths): better in 2 and not to be told apart in 1 of 3 pairs with LSE, '
        'worse in 1 of 1 pairs with LMD.',
        'AVS in false alarms (scale): better in 1 and worse in 1 of 2 pairs with LSE.']


def test_values_off_the_axis_do_not_overlap():
    "Four kinds of move off the axis at once, beside a metric that is infinite on the truth."
    rows = toy({'mse': (-.5, 6.), 'psnr': (.5, .1), 'ssim': (.5, 5.)})
    rows.loc[(rows['metric'] == 'psnr') & (rows['kind'] == 'harmless') & (rows['method'] == 'none'), 'value'] = np.inf
    shifted = rows[rows['method'] == 'shift_x']
    rows = pd.concat([rows, *(shifted.assign(method=m) for m in ('shift_y', 'rotation', 'scale'))], ignore_index=True)
    figure, _ = validity_figure(Study(rows)); figure.draw_without_rendering()
    texts = [t for t in figure.axes[1].texts if '›' in t.get_text()]; boxes = [t.get_window_extent() for t in texts]
    assert len(texts) == 8 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert [t.get_text() for t in figure.axes[1].texts].count('not defined') == 1


def test_the_seed_of_the_corpus_is_found():
    "That of the profile where the corpus was built with it, else 0 of the checkout; else the one given, which `Take` refuses."
    corpus = lambda seed: SimpleNamespace(rows=[dict(clip='a', seed=str(derive_seed(seed, 'clip', 'a')))])
    assert [_built_with(corpus(s), 7) for s in (7, 0, 3)] == [7, 0, 7]


def test_clips_are_rendered_with_the_seed_of_the_corpus(monkeypatch):
    corpus, seen = RenderedCorpus.__new__(RenderedCorpus), []
    corpus.rows = [dict(clip='a', seed=str(derive_seed(7, 'clip', 'a')))]
    line = dict(kind='rendered', method='none', level=0., clip='a', metric='ssim', value=1., lip_error=0.)
    for name, result in (('spoken_clips', []), ('available_metrics', []), ('expand', []), ('harmless_rows', []),
                         ('generated_rows', pd.DataFrame(columns=VALIDITY_FIELDS))):
        monkeypatch.setattr(f'talkingface.validity.{name}', lambda *args, result=result, **kwargs: result)
    monkeypatch.setattr('talkingface.validity.rendered_rows', lambda *args: seen.append(args[-1]) or [line])
    evaluate_validity({}, None, None, None, corpus, None, Scorers(), ValidityParams(), 'toy', seed=7)
    assert seen == [7]


def test_noise_follows_nothing():
    "A metric that is pure noise: the interval over clips holds 0."
    rows = toy({'avs_u[corpus]': (0., 0.)}, clips=16, noise=1.)
    line = correlations(rows).set_index('scope').loc['rendered']
    assert line['low'] < 0 < line['high'] and line['n'] == line['given'] == 16


def test_settings_are_checked():
    with pytest.raises(ParamsError, match='validity.levels'): ValidityParams(levels=dict(wek=[.5]))
    with pytest.raises(InputError, match='at least 2'): ValidityParams(rendered=1)
    assert middle(100, 60) == slice(20, 80) and set(HARMLESS) == {'shift_x', 'shift_y', 'rotation', 'scale'}
