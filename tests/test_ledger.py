"""The ledger: rules judge both ways, what is missing is not run, and the page states rules before numbers."""
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from talkingface.core import InputError, ParamsError
from talkingface.experiments import PUBLISHED_NETWORKS, published, write_rows
from talkingface.ledger import (CLAIMS_C, ENOUGH_SEEDS, EXPERT_VERDICTS, FEWEST_CLIPS, LEDGER, LEDGER_FIELDS, NO_LOSS, RULES, SHARE_OF_REPORTED, STEADINESS,
                                VERDICTS, FEWEST_RATERS, Bears, Compare, Evidence, Expert, Found, Leak, LedgerClaim, Open, Part, Rated, Spread, Steady, comparable,
                                crossed_interval, decide, is_part, ledger, ledger_counts, ledger_markdown, printed, read_evidence, readme_ledger, rows_of,
                                seed_interval, verdict_of, with_reported, write_ledger)
from talkingface.robustness import CLAIMS as EXPERT_CLAIMS
from talkingface.study import KEY_FORMAT, RATINGS_FORMAT, SCALES, collect_study, study_checksum


def rows(means: dict, clips=10, seeds=3, spread=.02, noise=.002, profile='demo', where='test'):
    "Made-up rows, {method: {metric: mean or a mean for each seed}}; all methods share what is easy or hard in a clip."
    hard, lines = np.linspace(-1, 1, clips), []
    for m, (method, metrics) in enumerate(means.items()):
        for metric, mean in metrics.items():
            for s, value in enumerate(np.broadcast_to(mean, seeds)):
                for c, name in enumerate(['all'] if metric.startswith('fid') else [f'clip_{c}' for c in range(clips)]):
                    value_of = value*(1 + spread*hard[c]*(name != 'all') + noise*np.sin(7*c + 3*s + m))
                    lines.append(dict(profile=profile, method=method, set=where, clip=name, seed=s, metric=metric, value=value_of, n_frames=9, protocol='', reason=''))
    return pd.DataFrame(lines)


def judge(rule, means, **options):
    return rule.judge(Evidence('demo', rows(means, **options)))


def leak(coefficients: dict, clips=8, frames=30, seeds=2, policy='per_frame'):
    out = []
    for method, values in coefficients.items():
        for s, value in enumerate(np.broadcast_to(values, seeds)):
            for c in range(clips):
                draw = np.random.default_rng([s, c]); target, reference = draw.uniform(0, 8, (2, frames))
                out.append(pd.DataFrame(dict(profile='demo', method=method, seed=s, policy=policy, clip=f'clip_{c}', frame=range(frames),
                                             generated=.7*target + value*reference + draw.normal(0, .3, frames), target=target, reference=reference)))
    return pd.concat(out, ignore_index=True)


def logs(noises: dict, seeds=3, lines=80):
    out = []
    for row, noise in noises.items():
        for s in range(seeds):
            draw = np.random.default_rng([len(row), s]).standard_normal((2, lines))*noise
            out.append(pd.DataFrame(dict(row=row, seed=s, step=range(lines), term='sync', sync=1 + draw[0], gradient=np.exp(draw[1]), loss=1.)))
    return pd.concat(out, ignore_index=True)


PLAIN = {'psnr': 28., 'lse_c[corpus]': .40, 'lmd': 2., 'fid_corpus': 3.}


@pytest.mark.parametrize('metric, better, worse', [('psnr', 30., 26.), ('lse_c', .45, .35), ('lmd', 1.5, 2.5), ('fid', 2., 4.)])
def test_a_difference_is_judged_both_ways(metric, better, worse):
    name = next(k for k in PLAIN if k.startswith(metric))
    for value, verdict in ((better, 'reproduced'), (worse, 'not_reproduced'), (PLAIN[name], 'inconclusive')):
        found = judge(Compare('new', 'plain', metric), {'plain': PLAIN, 'new': {name: value}})
        assert found.verdict == verdict and found.seeds == 3
        if verdict != 'inconclusive': assert found.measured == pytest.approx(value - PLAIN[name], rel=.05) and found.low < found.measured < found.high


def test_direction_can_be_the_one_that_is_worse():
    "Restoration is claimed to lower PSNR."
    assert judge(Compare('new', 'plain', 'psnr', up=False), {'plain': PLAIN, 'new': {'psnr': 26.}}).verdict == 'reproduced'
    with pytest.raises(ParamsError, match='no direction'): Compare('new', 'plain', 'offset').text()


SCALE = {'ground_truth': {'lse_c[corpus]': .5, 'lse_d[corpus]': .8}, 'shuffled_audio': {'lse_c[corpus]': .1, 'lse_d[corpus]': 1.2}}


@pytest.mark.parametrize('loss, verdict', [(-.10, 'reproduced'), (.01, 'reproduced'), (.08, 'not_reproduced'), (NO_LOSS*.4, 'inconclusive')])
def test_no_loss_is_a_share_of_what_separates_truth_from_wrong_speech(loss, verdict):
    means = SCALE | {'plain': {'lse_c[corpus]': .40, 'lse_d[corpus]': .9}, 'new': {'lse_c[corpus]': .40 - loss, 'lse_d[corpus]': .9 + loss}}
    for metric in ('lse_c', 'lse_d'):
        found = judge(Compare('new', 'plain', metric, margin=NO_LOSS), means, noise=.004)
        assert found.verdict == verdict and 'from shuffled audio 0 to ground truth 1: 0.75 to' in found.why


def test_no_loss_needs_its_scale():
    rule = Compare('new', 'plain', 'lse_c', margin=NO_LOSS); means = {'plain': PLAIN, 'new': {'lse_c[corpus]': .40}}
    absent = judge(rule, {'ground_truth': SCALE['ground_truth']} | means)
    assert absent.verdict == 'inconclusive' and 'shuffled audio' in absent.why and absent.n == 10 and absent.seeds == 3
    deaf = judge(rule, {'ground_truth': {'lse_c[corpus]': .1}, 'shuffled_audio': {'lse_c[corpus]': .5}} | means)
    assert deaf.verdict == 'inconclusive' and 'does not tell' in deaf.why
    with pytest.raises(ParamsError, match='no loss'): Compare('new', 'plain', 'lmd', margin=NO_LOSS)


def test_a_row_above_the_truth_is_pointed_out():
    means = SCALE | {'plain': PLAIN, 'new': {'lse_c[corpus]': .55}}
    found = judge(Compare('new', 'plain', 'lse_c'), means)
    assert found.verdict == 'reproduced' and 'above the truth: `new`' in found.why and '0.75 to 1.1' in found.why
    assert 'above the truth' not in judge(Compare('new', 'plain', 'lse_c'), SCALE | {'plain': PLAIN, 'new': {'lse_c[corpus]': .45}}).why


def test_trainings_that_disagree_settle_nothing():
    means = {'plain': PLAIN, 'new': {'psnr': (32., 32., 27.)}}
    assert judge(Compare('new', 'plain', 'psnr'), means).verdict == 'inconclusive'
    assert decide(.1, .3, (.5, .3, -.1)) == ('inconclusive', 'trainings disagree: 0.5, 0.3, -0.1')
    scattered = judge(Compare('new', 'plain', 'psnr'), {'plain': PLAIN, 'new': {'psnr': (34., 32., 28.5)}})
    assert scattered.verdict == 'inconclusive' and scattered.low < 0                      # one side, but too far apart
    assert judge(Compare('new', 'plain', 'psnr'), {'plain': PLAIN, 'new': {'psnr': (30., 30.5, 30.2)}}).verdict == 'reproduced'


def exact(gains, seeds=3, metric='psnr', before=28.):
    "Rows `plain` and `new` whose difference in each clip is known, the same in all trainings."
    lines = [dict(profile='demo', method=m, set='test', clip=f'clip_{c}', seed=s, metric=metric, value=before + g*(m == 'new'), n_frames=9, protocol='', reason='')
             for m in ('plain', 'new') for s in range(seeds) for c, g in enumerate(gains)]
    return Evidence('demo', pd.DataFrame(lines))


@pytest.mark.parametrize('low, high, verdict', [(-1., 1.9, 'not_reproduced'), (-1., 2., 'inconclusive'), (-1., 4.5, 'inconclusive'), (-3., -1., 'not_reproduced'),
                                                (0., 1.9, 'not_reproduced'), (1e-9, 1.9, 'reproduced'), (.5, 3., 'reproduced')])
def test_half_of_the_reported_difference_is_an_edge(low, high, verdict):
    "Of a reported 4; the same mirrored, where less is better. Without a reported difference only 0 is an edge."
    assert SHARE_OF_REPORTED == .5
    for n in (3, ENOUGH_SEEDS, 12):
        seeds = [(low + high)/2]*n
        assert decide(low, high, seeds, reported=4.)[0] == decide(-high, -low, [-v for v in seeds], up=False, reported=-4.)[0] == verdict
    for reported in (None, -4., 0.):            # not known, against the claim, none
        assert decide(low, high, seeds, reported=reported) == decide(low, high, seeds)
    alone = decide(low, high)                   # clips alone, or two trainings, exclude no half
    assert decide(low, high, reported=4.) == alone and decide(low, high, seeds[:2], reported=4.) == alone


def test_why_tells_of_the_half():
    assert decide(-1., 1.9, (.1, .2, .3), reported=3.99)[1] == 'the interval holds 0 and lies short of half of the reported +3.99'
    assert decide(.2, 1.9, (.3, .4, .5), reported=3.99)[1] == \
        'the interval lies above 0 and short of half of the reported +3.99: less than half as large as reported'
    assert decide(-3., -1., (-2., -1., -3.), reported=3.99)[1] == 'the interval lies below 0'
    assert decide(-3., -1., (-2., .1, -3.), reported=3.99) == \
        ('not_reproduced', 'the interval lies below 0 (trainings disagree: -2, 0.1, -3) and lies short of half of the reported +3.99')
    assert decide(.1, .3, (.5, .3, -.1), reported=3.99) == ('inconclusive', 'trainings disagree: 0.5, 0.3, -0.1')
    assert decide(-1., 1.9, (.1, .2, 2.1), reported=3.99)[0] == 'inconclusive'      # one of few trainings reaches half
    assert decide(-1., 1.9, (.1, .2, .1, .2, .1, 2.1), reported=3.99)[0] == 'not_reproduced'


@pytest.mark.parametrize('ratio, verdict', [(1.01, 'not_reproduced'), (.99, 'inconclusive')])
def test_the_half_is_compared_with_the_crossed_interval(ratio, verdict):
    "Clips that gain and lose 1 dB, the same in all trainings: Student's interval over clips, whose end is known."
    from scipy.stats import t
    gains = np.tile([1., -1.], 6); end = t.ppf(.975, 11)*np.sqrt(12/11/12); rule = Compare('new', 'plain', 'psnr')
    found = replace(rule, reported=2*end*ratio).judge(exact(gains))
    assert found.high == pytest.approx(end) and found.low == pytest.approx(-end) and found.verdict == verdict
    assert rule.judge(exact(gains)).verdict == 'inconclusive' and replace(rule, reported=9., up=False).judge(exact(gains)).verdict == 'inconclusive'
    assert replace(rule, reported=9.).judge(exact(gains)).verdict == 'not_reproduced'
    for few in (exact(gains, seeds=1), exact(gains, seeds=2), exact(gains[:6])):        # two trainings, six clips
        found = replace(rule, reported=9.).judge(few); assert found.verdict == 'inconclusive' and 'half of the reported' not in found.why


def test_the_half_counts_where_ours_and_theirs_are_one_metric():
    gains = np.tile([.01, -.01], 6)
    for metric, here in (('psnr', True), ('ssim', True), ('mse', True), ('lmd', False), ('lse_c[corpus]', False), ('lse_c[syncnet_v2]', True),
                         ('lpips_corpus', False), ('lpips[alex]', True), ('lpips[vgg]', False), ('avs_u[corpus]', False), ('avs_u[large]', False)):
        base = metric.partition('[')[0].removesuffix('_corpus'); up = base in ('psnr', 'ssim', 'lse_c', 'avs_u')
        rule = Compare('new', 'plain', base, reported=.4 if up else -.4)
        assert comparable(metric) == here
        assert rule.judge(exact(gains, metric=metric, before=.5)).verdict == ('not_reproduced' if here else 'inconclusive')
        told = rule.text().partition('; ')[2]; network = PUBLISHED_NETWORKS.get(base)
        assert told.endswith(f'where both are scored by {network}') if network else ('half of the reported' in told) == here
    for name, value in (('fid_corpus', 'inconclusive'), ('fid[inception]', 'not_reproduced')):
        table = rows({'plain': {name: 3.}, 'new': {name: 3.}})
        assert Compare('new', 'plain', 'fid', reported=-2.).judge(Evidence('demo', table)).verdict == value
    assert comparable('fid[inception]') and not comparable('fid_corpus') and not comparable('fid')
    held = Compare('new', 'plain', 'lse_c', margin=NO_LOSS, reported=.4)
    assert held.claimed is None and held.text() == replace(held, reported=None).text()


@pytest.mark.parametrize('metric, reported, before, verdict', [('ssim', .3, .69, 'not_reproduced'), ('ssim', .3, .71, 'inconclusive'),
                                                               ('mse', -.3, .31, 'not_reproduced'), ('mse', -.3, .29, 'inconclusive')])
def test_what_leaves_no_room_for_the_reported_difference_is_not_held_against_it(metric, reported, before, verdict):
    found = Compare('new', 'plain', metric, reported=reported).judge(exact(np.tile([.01, -.01], 6), metric=metric, before=before))
    assert found.verdict == verdict and ('is left up to the best value' in found.why) == (verdict == 'inconclusive')


def test_half_an_effect_is_rarely_excluded_where_it_is_there():
    "True differences of half of what was reported, and of all of it: how often that is called not reproduced; and where there is none."
    draw = np.random.default_rng(5).standard_normal; noise = draw((800, 20, 1)) + .3*draw((800, 1, 6)) + draw((800, 20, 6))
    def called(truth, seeds=6, reported=4.):
        gaps = truth + noise[..., :seeds]; _, low, high = crossed_interval(gaps)
        return np.mean([decide(l, h, g.mean(0), reported=reported)[0] == 'not_reproduced' for l, h, g in zip(low, high, gaps)])
    assert called(4.) == 0 and called(2.) < .05 and called(0.) > .9 and called(0., reported=None) < .05


@pytest.mark.parametrize('n, verdict', [(3, 'inconclusive'), (ENOUGH_SEEDS - 1, 'inconclusive'), (ENOUGH_SEEDS, 'reproduced'), (12, 'reproduced')])
def test_from_six_trainings_on_their_signs_decide_nothing(n, verdict):
    assert ENOUGH_SEEDS == 6
    one_off = [*[.5]*(n - 1), -.1]
    assert decide(.1, .7, one_off)[0] == verdict and decide(-.7, -.1, [-v for v in one_off], up=False)[0] == verdict
    assert decide(-.1, .7, one_off)[0] == 'inconclusive'                            # the interval still has to exclude 0
    gaps = np.tile(np.linspace(-.02, .02, 12)[:, None], n) + np.r_[np.full(n - 1, 1.), -.001]
    wide = seed_interval(gaps.mean(0)); assert (wide[0] > 0) == (n >= 5)            # Student's alone: one of three or four that turns takes 0 in


def test_six_trainings_of_a_row_decide_by_their_interval():
    means = {'plain': PLAIN, 'new': {'psnr': (30., 30.2, 29.9, 30.1, 30.3, 27.9)}}
    found = judge(Compare('new', 'plain', 'psnr'), means, seeds=6, noise=0.)
    assert found.verdict == 'reproduced' and found.seeds == 6 and found.low > 0
    five = {'plain': PLAIN, 'new': {'psnr': (30., 30.2, 29.9, 30.1, 27.99)}}
    assert judge(Compare('new', 'plain', 'psnr'), five, seeds=5, noise=0.).verdict == 'inconclusive'
    logs_ = logs({'plain': .3, 'steady': .1}, seeds=6); assert Steady('steady', 'plain').judge(Evidence('demo', logs=logs_)).seeds == 6


@pytest.mark.parametrize('seeds, word', [(1, 'one training'), (2, 'two trainings')])
def test_fewer_than_three_trainings_settle_nothing(seeds, word):
    found = judge(Compare('new', 'plain', 'psnr'), {'plain': PLAIN, 'new': {'psnr': 30.}}, seeds=seeds)
    assert found.verdict == 'inconclusive' and found.seeds == seeds and 0 < found.low < found.high
    assert found.why.startswith(f'{word} of each row; over clips alone: reproduced')


@pytest.mark.parametrize('clips, verdict', [(1, 'inconclusive'), (FEWEST_CLIPS - 1, 'inconclusive'), (FEWEST_CLIPS, 'reproduced')])
def test_few_clips_settle_nothing(clips, verdict):
    found = judge(Compare('new', 'plain', 'psnr'), {'plain': PLAIN, 'new': {'psnr': 30.}}, clips=clips)
    assert found.verdict == verdict and (verdict == 'reproduced' or f'a verdict takes {FEWEST_CLIPS}' in found.why)


def test_clips_that_a_training_lacks_are_left_out():
    table = rows({'plain': PLAIN, 'new': {'psnr': 30.}}); table = table[~((table['method'] == 'new') & (table['seed'] == 2) & (table['clip'] == 'clip_0'))]
    found = Compare('new', 'plain', 'psnr').judge(Evidence('demo', table))
    assert (found.verdict, found.n, found.seeds) == ('reproduced', 9, 3) and '1 clips' in found.why


@pytest.mark.parametrize('seeds', [3, 6])
@pytest.mark.parametrize('sd', [0., .1, .3, 1.])
def test_the_crossed_interval_holds_what_it_should(sd, seeds):
    draw = np.random.default_rng(7).standard_normal; gaps = draw((3000, 20, 1)) + sd*draw((3000, 1, seeds)) + draw((3000, 20, seeds))
    mean, low, high = crossed_interval(gaps)
    assert .92 < ((low < 0) & (high > 0)).mean() < .985 and np.allclose(mean, gaps.mean((1, 2)))
    assert np.allclose([v[5] for v in (mean, low, high)], crossed_interval(gaps[5]))


@pytest.mark.parametrize('sd, most', [(0., .06), (.5, .08)])
def test_false_alarms_are_rare(sd, most):
    "Rows that are equal on average: how many rules are settled, with trainings that scatter or do not."
    alarms, times = 0, 150
    for i in range(times):
        draw = np.random.default_rng([11, i]).standard_normal; table = rows({'plain': {'psnr': 28.}, 'new': {'psnr': 28.}}, clips=12)
        extra = draw((12, 1)) + sd*draw((1, 3)) + draw((12, 3)); new = table['method'] == 'new'
        clip = table['clip'].str.removeprefix('clip_').astype(int)
        table.loc[new, 'value'] += extra[clip[new], table.loc[new, 'seed']]
        alarms += Compare('new', 'plain', 'psnr').judge(Evidence('demo', table)).verdict != 'inconclusive'
    assert alarms/times < most


@pytest.mark.parametrize('seeds, verdict', [(1, 'inconclusive'), (2, 'inconclusive'), (3, 'reproduced')])
def test_metrics_of_a_set_need_three_trainings(seeds, verdict):
    found = judge(Compare('new', 'plain', 'fid'), {'plain': PLAIN, 'new': {'fid_corpus': 2.}}, seeds=seeds)
    assert found.verdict == verdict and found.measured < 0 and np.isnan(found.low) == (seeds < 3)
    assert verdict == 'reproduced' or found.why.startswith({1: 'one training', 2: 'two trainings'}[seeds])
    table = rows({'plain': PLAIN, 'new': {'fid_corpus': 2.}}).assign(reason='fewer frames than dimensions')
    assert 'with care: fewer frames' in Compare('new', 'plain', 'fid').judge(Evidence('demo', table)).why
    assert judge(Compare('new', 'plain', 'fid'), {'plain': PLAIN, 'new': {'fid_corpus': (1., 2., 5.)}}).verdict == 'inconclusive'


def test_only_shared_clips_and_trainings_count():
    table = rows({'plain': PLAIN, 'new': {'psnr': 30.}})
    table = table[~((table['method'] == 'new') & ((table['seed'] == 2) | (table['clip'] == 'clip_0')))]
    found = Compare('new', 'plain', 'psnr').judge(Evidence('demo', table))
    assert (found.n, found.seeds) == (9, 2)
    apart = pd.concat([table[table['method'] == 'plain'], table[table['method'] == 'new'].assign(clip='elsewhere', seed=range(18))])
    assert Compare('new', 'plain', 'psnr').judge(Evidence('demo', apart)).verdict == 'not_run'


def test_published_networks_come_first():
    both = {'lse_c[corpus]': .4, 'lse_c[syncnet_v2]': 7.}
    found = judge(Compare('new', 'plain', 'lse_c'), {'plain': both, 'new': {'lse_c[corpus]': .5, 'lse_c[syncnet_v2]': 6.}})
    assert found.verdict == 'not_reproduced' and 'syncnet_v2' in found.why
    assert judge(Compare('new', 'plain', 'lse_c'), {'plain': both, 'new': {'lse_c[corpus]': .5}}).verdict == 'reproduced'


def test_a_row_that_was_not_run_tells_its_reason():
    absent = pd.DataFrame([dict(profile='demo', method='setup_c', set='test', clip='all', seed=0, metric=m, value=np.nan, n_frames=0, protocol='',
                                reason='wav2vec2.safetensors is not in weights/') for m in ('lse_c', 'lmd')])
    found = Compare('setup_c', 'setup_a', 'lse_c').judge(Evidence('demo', pd.concat([absent, rows({'setup_a': PLAIN})])))
    assert found.verdict == 'not_run' and 'wav2vec2.safetensors' in found.why and np.isnan(found.measured)
    lacks = Compare('setup_a', 'other', 'ssim').judge(Evidence('demo', rows({'setup_a': PLAIN})))
    assert lacks.why == 'no rows of other; setup_a has no ssim on test'


def test_leaking_is_judged_both_ways_and_by_intervention_alone():
    evidence = Evidence('demo', leak=leak({'random': .4, 'silent': .05, 'same': .4, 'torn': (.6, .1, .2)}, seeds=3))
    assert Leak('silent', 'random').judge(evidence).measured == pytest.approx(-.35, abs=.02)
    assert [Leak(*pair).judge(evidence).verdict for pair in (('silent', 'random'), ('random', 'silent'), ('same', 'random'), ('torn', 'random'))] == \
        ['reproduced', 'not_reproduced', 'inconclusive', 'inconclusive']
    own = Evidence('demo', leak=pd.concat([evidence.leak, leak({'random': .0, 'silent': .9}, policy='own', seeds=3)]))
    assert Leak('silent', 'random').judge(own) == Leak('silent', 'random').judge(evidence)
    assert Leak('silent', 'absent').judge(evidence) == Found('not_run', 'no leak intervention of absent')
    still = evidence.leak.assign(reference=3.)
    assert Leak('silent', 'random').judge(Evidence('demo', leak=still)).verdict == 'inconclusive'
    few = Leak('silent', 'random').judge(Evidence('demo', leak=leak({'random': .4, 'silent': .05}, seeds=2)))
    assert few.verdict == 'inconclusive' and few.why.startswith('two trainings of each row; over clips alone: reproduced')


def test_people_with_large_mouths_are_no_leak():
    "Neither row copies anything, but outputs of one are larger the larger the mouths of the person are: the pooled coefficient is taken in."
    parts = []
    for s in range(3):
        for c in range(12):
            draw = np.random.default_rng([9, s, c]); target, reference = draw.uniform(0, 4, (2, 60)) + c
            for method, share in (('plain', 0.), ('sized', .5)):
                parts.append(pd.DataFrame(dict(profile='demo', method=method, seed=s, policy='per_frame', clip=f'clip_{c}', frame=range(60), target=target,
                                               reference=reference, generated=.4*target + share*c + draw.normal(0, .3, 60))))
    evidence = Evidence('demo', leak=pd.concat(parts, ignore_index=True))
    for pair in (('plain', 'sized'), ('sized', 'plain')):
        found = Leak(*pair).judge(evidence); assert found.verdict in ('inconclusive', 'not_reproduced') and abs(found.measured) < .03
    assert Leak('plain', 'sized').judge(evidence).verdict != 'reproduced' and 'pooled 0.2' in Leak('plain', 'sized').judge(evidence).why


def test_spread_over_clips_is_judged_both_ways():
    wide, narrow = rows({'wide': {'lse_c[corpus]': .4}}, clips=40, spread=.4), rows({'narrow': {'lse_c[corpus]': .4}}, clips=40, spread=.1)
    low = narrow.assign(method='low', value=narrow['value']/4)                    # a lower score varies less; relative to itself it does not
    evidence = Evidence('demo', pd.concat([wide, narrow, low]))
    assert Spread('narrow', 'wide').judge(evidence).verdict == 'reproduced' and Spread('wide', 'narrow').judge(evidence).verdict == 'not_reproduced'
    assert Spread('low', 'narrow').judge(evidence).verdict == 'reproduced' and Spread('low', 'narrow', relative=True).judge(evidence).verdict == 'inconclusive'
    assert Spread('narrow', 'absent').judge(evidence).verdict == 'not_run'
    found = Spread('narrow', 'wide').judge(evidence)
    value = lambda t: t.pivot(index='clip', columns='seed', values='value').var(ddof=0).mean()
    assert found.measured == pytest.approx(value(narrow) - value(wide)) and found.n == 40


@pytest.mark.parametrize('column', list(STEADINESS))
def test_stability_is_judged_both_ways(column):
    evidence = Evidence('demo', logs=logs({'plain': .3, 'steady': .1}))
    assert Steady('steady', 'plain', column).judge(evidence).verdict == 'reproduced'
    assert Steady('plain', 'steady', column).judge(evidence).verdict == 'not_reproduced'
    assert Steady('steady', 'absent', column).judge(evidence).verdict == 'not_run'
    two = Steady('steady', 'plain', column).judge(Evidence('demo', logs=logs({'plain': .3, 'steady': .1}, seeds=2)))
    assert two.verdict == 'inconclusive' and two.why.startswith('two trainings of each row')
    broken = evidence.logs.copy(); broken.loc[3, 'sync'] = np.nan
    assert 'not finite' in Steady('steady', 'plain', column).judge(Evidence('demo', logs=broken)).why


def test_verdicts_on_experts_are_taken_over():
    told = pd.DataFrame([dict(claim=f'claim {v}', measure='sd', main=True, first_value=.2, second_value=.3, measured=-.1, low=-.2, high=-.05, verdict=v,
                              note='sd: so; cv: so' if v == 'mixed' else np.nan, n=9, seeds=1) for v in EXPERT_VERDICTS])
    for theirs, ours in EXPERT_VERDICTS.items():
        found = Expert(f'claim {theirs}').judge(Evidence('demo', experts=told))
        assert found.verdict == ours
        if theirs == 'mixed': assert 'sd: so; cv: so' in found.why
    with pytest.raises(InputError, match='verdict'): Expert('claim mixed').judge(Evidence('demo', experts=told.assign(verdict='perhaps')))
    assert Expert('unknown').judge(Evidence('demo', experts=told)).verdict == 'not_run'


def test_every_claim_on_experts_is_in_the_ledger():
    named = {p.rule.claim for c in LEDGER for p in c.parts if isinstance(p.rule, Expert)}
    assert named == {c.text for c in EXPERT_CLAIMS if c.paper in 'AB'}


def test_robust_metrics_are_judged_both_ways():
    table = pd.DataFrame([dict(degradation='shift_x', level=v, clip=f'clip_{c}', metric=m, value=(1 + .01*c)*(1 - k*abs(v)))
                          for m, k in (('avs_u[corpus]', .001), ('lse_c[corpus]', .03)) for v in (-10, 0, 10) for c in range(4)])
    evidence = Evidence('demo', behaviour=table)
    assert [r.judge(evidence).verdict for r in (Bears('avs_u', 'lse_c'), Bears('lse_c', 'avs_u'), Bears('avs_u'), Bears('lse_c'))] == \
        ['reproduced', 'not_reproduced', 'reproduced', 'not_reproduced']
    assert Bears('avs_u').judge(evidence).measured == pytest.approx(.01) and Bears('lmd').judge(evidence).verdict == 'not_run'
    assert Bears('avs_u').judge(Evidence('demo', behaviour=table[table['level'] != 0])).verdict == 'not_run'


@pytest.mark.parametrize('parts, verdict', [('rr', 'reproduced'), ('rn', 'not_reproduced'), ('ri', 'inconclusive'), ('ni', 'not_reproduced'),
                                            ('r0', 'inconclusive'), ('n0', 'not_reproduced'), ('00', 'not_run'), ('i', 'inconclusive')])
def test_a_claim_follows_from_its_parts(parts, verdict):
    assert verdict_of([dict(r='reproduced', n='not_reproduced', i='inconclusive')[p] if p != '0' else 'not_run' for p in parts]) == verdict


def test_what_is_told_beside_decides_nothing():
    evidence = Evidence('demo', rows({'plain': PLAIN, 'new': {'psnr': 30., 'lmd': 3.}}))
    claim = LedgerClaim('X', 'A', 'new is better', 'here', (*rows_of('psnr', method='new', other='plain'), *rows_of('lmd', method='new', other='plain', counts=False)))
    table = ledger(evidence, (claim,)).set_index('id')
    assert table['verdict'].to_dict() == {'X': 'reproduced', 'X.psnr': 'reproduced', 'X.lmd': 'not_reproduced'} and 'LMD' not in table.loc['X', 'why']
    with pytest.raises(ParamsError, match='no part that decides'): LedgerClaim('Y', 'A', 'x', 'here', rows_of('psnr', method='new', other='plain', counts=False))
    with pytest.raises(ParamsError, match='one name'): LedgerClaim('Y', 'A', 'x', 'here', (Part('a', Open('x', 'y')), Part('a', Open('x', 'y'))))


def test_what_explains_a_failure_is_shown_with_it_alone():
    claim = LedgerClaim('X', 'A', 'new is better', 'here', rows_of('psnr', method='new', other='plain'), explained_by=('how it cheats', 'fig_x.png'))
    shown = [('fig_x.png' in ledger(Evidence('demo', rows({'plain': PLAIN, 'new': {'psnr': v}})), (claim,))['why'][0]) for v in (26., 28., 30.)]
    assert shown == [True, False, False]


def test_experiments_that_may_explain_are_told_where_they_were_run():
    claim = next(c for c in LEDGER if c.id == 'A4'); worse = {'setup_d': PLAIN | {'ssim': .9}, 'setup_e': {'psnr': 27., 'ssim': .8, 'lse_c[corpus]': .40}}
    why = lambda means: ledger(Evidence('demo', rows(SCALE | means)), (claim,))['why'][0]
    assert 'floor of 0.1' not in why(worse) and 'table_sync_losses' in why(worse)
    told = why(worse | {'ss_floor': {'psnr': 30., 'lse_c[corpus]': .41}})
    assert re.search(r'with a floor of 0.1, PSNR in dB minus `setup_d`: \+[12]\.?\d* \[\+', told) and 'closed reference, ' not in told
    lone = LedgerClaim('X', 'A', 'new is better', 'here', rows_of('psnr', method='setup_e', other='setup_d'))
    assert 'no experiment beyond the tables' in ledger(Evidence('demo', rows(worse)), (lone,))['why'][0]


def test_the_readme_tells_the_effect_that_decides(tmp_path):
    evidence = Evidence('demo', rows(SCALE | {'setup_a': PLAIN | {'lse_d[corpus]': 1.}, 'setup_b': {'lse_c[corpus]': .45, 'lse_d[corpus]': .9, 'lmd': 2.5}}))
    write_ledger(ledger(evidence), tmp_path/'paper_figures'/'demo'/'claims')
    line = next(l for l in readme_ledger(tmp_path, 'demo').splitlines() if l.startswith('| A7 |'))
    assert re.search(r'LMD: \+0\.\d+ \[\+0\.\d+, \+0\.\d+\] \(3 trainings\)', line) and line.endswith('| 10 | not reproduced |')


def test_the_ledger_is_well_formed(tmp_path):
    assert len({c.id for c in LEDGER}) == len(LEDGER) and {c.paper for c in LEDGER} == set('ABC')
    assert all(c.id.startswith(c.paper) and c.statement and c.where and '.' not in c.id for c in LEDGER)
    texts = [p.rule.text() for c in LEDGER for p in c.parts]
    assert all(len(t) > 20 for t in texts)
    ids = {c.id for c in LEDGER}
    assert {f'A{i}' for i in range(1, 18)} <= ids and {f'B{i}' for i in range(1, 11)} <= ids and {f'C{i}' for i in range(1, 10)} <= ids


def test_without_files_nothing_is_run_and_nothing_fails(tmp_path):
    table = ledger(read_evidence('demo', tmp_path/'rows', tmp_path/'leak.csv', tmp_path/'claims_experts.csv', tmp_path/'generators', tmp_path/'behaviour.csv'))
    assert list(table) == list(LEDGER_FIELDS) and set(table['verdict']) == {'not_run'}
    assert table['id'].is_unique and (table['why'].str.len() > 5).all() and table[['measured', 'low', 'high']].isna().all(axis=None)
    claims = table[~is_part(table)].set_index('id')
    assert 'no rows of visual_visual' in claims.loc['B5', 'why'] and 'no rows of g4g' in claims.loc['C5', 'why'] and 'no rows of setup_c' in claims.loc['A8', 'why']
    assert ledger_counts(table)['not_run'].sum() == len(LEDGER) == len(claims)


def test_pairs_of_metrics_decide_where_the_validity_study_lets_them(root):
    path = root/'paper_figures'/'demo'/'av_expert'/'fig_validity_differences.csv'
    if not path.is_file(): pytest.skip('no validity study of demo in this checkout')
    gaps = pd.read_csv(path); short = lambda name: name.partition('[')[0]
    decides = {(short(g.metric), short(g.other), g.scope): g.decides for g in gaps[gaps['measure'] == 'correlation'].itertuples()}
    claim = next(c for c in LEDGER if c.id == 'B10')
    for part in claim.parts:
        assert part.counts == decides[part.rule.metric, part.rule.other, part.rule.scope], part.key
    assert {(p.rule.other, p.rule.scope): p.counts for p in claim.parts} == {
        ('lse_c', 'generated'): True, ('lmd', 'generated'): False, ('lse_c', 'rendered'): True, ('lmd', 'rendered'): True}


def test_what_was_reported_comes_from_the_table_of_published_numbers():
    table = ledger(Evidence('demo')).set_index('id')
    assert table.loc['A4.psnr', 'reported'] == '27.18† → 31.17†' and table.loc['A5.fid', 'reported'] == '? → 4.02†'
    assert table.loc['B5.lse_c', 'reported'] == '7.481 → 7.958' and table.loc['C6.psnr', 'reported'] == '27.6478 → 27.5560'
    variance = published(paper='stabilized_sync', metric='lse_c_variance').set_index('row')['value']
    assert f"{variance['syncnet']:g}† → {variance['avsyncnet']:g}†" in table.loc['A6', 'reported']
    assert 'FID 4.10† → 3.83†' in table.loc['A15', 'reported'] and table.loc['C8', 'reported'] == 'visual 3.14 → 3.41; sync 3.91 → 4.26; realness 3.68 → 4.34'
    assert not table[['reported', 'why']].apply(lambda c: c.str.contains('[{}]')).any(axis=None) and '27.18† dB' in table.loc['A4', 'why']
    assert set(printed()['value'].map(type)) == {str} and np.allclose(printed()['value'].astype(float), published()['value'])


def test_the_reported_difference_is_that_of_the_printed_cells():
    known = printed(); rules = {f'{c.id}.{p.key}': with_reported(p.rule, c.table, known) for c in LEDGER for p in c.parts}
    wanted = {k: r.reported for k, r in rules.items() if getattr(r, 'reported', None) is not None}
    assert wanted['A4.psnr'] == 3.99 and wanted['A4.ssim'] == .053 and wanted['A9.psnr'] == -.84 and wanted['C6.psnr'] == -.0918 and wanted['A8b.lse_d'] == -.052
    assert 'A5.fid' not in wanted and 'A10.test_psnr' not in wanted and 'A4.lse_c' not in wanted       # one side was not found
    plain = {k.partition('.')[0] for k, r in rules.items() if 'half of the reported' in r.text()}
    assert plain == {'A3', 'A4', 'A5', 'A7', 'A8', 'A8b', 'A9', 'B5', 'B6', 'B7', 'C1', 'C2', 'C3', 'C4', 'C5', 'C7'}
    table = ledger(Evidence('demo')).set_index('id')['rule']
    assert table['A4.psnr'].endswith('above 0; not_reproduced, too, if the interval lies wholly short of half of the reported +3.99 dB')
    assert table['A9.ssim'].endswith('below 0; not_reproduced, too, if the interval lies wholly short of half of the reported −0.047')
    assert table['A3.lse_c'].endswith('half of the reported +0.481, where both are scored by syncnet_v2')
    assert 'half of' not in ' '.join(table[[k for k in table.index if k.startswith(('C6', 'A2.', 'A10.', 'A4.lse', 'A4av'))]])
    assert with_reported(Open('x', 'y'), ('g4g', 'table_01'), known) == Open('x', 'y')


def test_mse_of_paper_c_is_on_the_scale_of_ours():
    "Its PSNR follows from it for values in [0,1], to the digits that are printed and to what the mean over frames does."
    cells = published(paper='g4g').query("metric in ('psnr', 'mse')").pivot(index=['table', 'set', 'row'], columns='metric', values='value')
    assert len(cells) == 14 and (cells['psnr'] + 10*np.log10(cells['mse'])).abs().max() < 1


def test_the_ledger_settles_what_excludes_half_of_the_reported_difference():
    flat = {'setup_d': PLAIN | {'ssim': .88}, 'setup_e': PLAIN | {'ssim': .88}}; table = ledger(Evidence('demo', rows(SCALE | flat))).set_index('id')
    assert table.loc[['A4.psnr', 'A4.ssim', 'A4'], 'verdict'].tolist() == ['not_reproduced']*3
    assert 'holds 0 and lies short of half of the reported +3.99' in table.loc['A4.psnr', 'why']
    two = ledger(Evidence('demo', rows(SCALE | flat, seeds=2))).set_index('id')
    assert two.loc[['A4.psnr', 'A4'], 'verdict'].tolist() == ['inconclusive']*2


def test_what_a_paper_contradicts_itself_is_computed_right():
    "Every number with four digits in the notes on paper C stands in its tables, and the shares follow from them."
    printed = {f'{v:g}' for v in published(paper='g4g')['value']}
    notes = {c.id: c.note for c in CLAIMS_C}
    for note in notes.values():
        for number in re.findall(r'\d+\.\d{3,}', note): assert number in printed, number
    assert .9083/.8935 - 1 == pytest.approx(.017, abs=.0005) and .9101/.8928 - 1 == pytest.approx(.019, abs=.0005) and '1.7 %' in notes['C2']
    assert 7.3381/7.0682 - 1 == pytest.approx(.038, abs=.0005) and '3.8 %' in notes['C5']
    assert [round(100*(a/b - 1), 1) for a, b in ((3.41, 3.14), (4.26, 3.91), (4.34, 3.68))] == [8.6, 9.0, 17.9]
    cells = published(paper='g4g', table='table_02').set_index(['row', 'metric'])['value']
    for metric, up in dict(psnr=1, ssim=1, lse_c=1, lpips=0, mse=0, lse_d=0).items():
        assert (cells['no_supervision', metric] > cells['ours', metric]) == bool(up)


def test_the_page_states_rules_before_numbers(tmp_path):
    evidence = Evidence('demo', rows({'setup_a': PLAIN | {'lse_d[corpus]': 1.}, 'setup_b': {'lse_c[corpus]': .45, 'lse_d[corpus]': .9, 'lmd': 2.5}}))
    table = ledger(evidence); page = ledger_markdown(table); line = table.set_index('id').loc['A7']
    assert line['verdict'] == 'not_reproduced' and line['n'] == 10 and line['seeds'] == 3
    rules, verdicts = page.split('\n## Verdicts')
    for text in (*RULES, *table['rule']): assert text in rules
    assert not re.search(r'\[−?\d', rules) and not any(f'**{v}**' in rules for v in VERDICTS)       # no interval and no verdict before the rules
    assert f"| {ledger_counts(table).loc['A', 'not_reproduced']} |" in verdicts and f'1 of {len(LEDGER)} claims are settled' in verdicts
    assert '| A7.lmd |' in verdicts and '| A8.lmd |' not in verdicts                                 # parts of what was not run
    rows_ = [l for l in page.splitlines() if l.startswith('| A')]
    assert {l.count(' | ') for l in rows_ if l in rules} == {2} and {l.replace('\\|', '').count(' | ') for l in verdicts.splitlines() if l.startswith('| A7')} == {6}


def test_files_are_read_written_and_equal(tmp_path):
    write_rows(tmp_path/'rows'/'plain.csv', rows({'setup_d': PLAIN})); write_rows(tmp_path/'rows'/'new.csv', rows({'setup_e': {'psnr': 30., 'lse_c[corpus]': .4}}))
    (tmp_path/'generators'/'setup_e'/'seed-1').mkdir(parents=True); (tmp_path/'generators'/'sync_none').mkdir()
    log = pd.DataFrame({'step': range(50), 'loss': 1., 'stabilized_sync': np.linspace(1, .5, 50), 'weight_stabilized_sync': 2., 'grad_generator': 1.})
    for path in ('setup_e', 'setup_e/seed-1'): log.to_csv(tmp_path/'generators'/path/'log.csv', index=False)
    log[['step', 'loss']].to_csv(tmp_path/'generators'/'sync_none'/'log.csv', index=False)
    evidence = read_evidence('demo', tmp_path/'rows', generators=tmp_path/'generators')
    assert evidence.logs.groupby('row')['seed'].unique().map(list).to_dict() == {'setup_e': [0, 1]}
    first = [p.read_bytes() for p in write_ledger(ledger(evidence), tmp_path/'claims')]
    assert first == [p.read_bytes() for p in write_ledger(ledger(evidence), tmp_path/'claims')]
    table = pd.read_csv(tmp_path/'claims.csv', keep_default_na=False)
    assert list(table) == list(LEDGER_FIELDS) and set(table['verdict']) <= set(VERDICTS)
    assert table.set_index('id').loc['A4.psnr', 'verdict'] == 'reproduced'
    with pytest.raises(InputError, match='profile'): read_evidence('medium', tmp_path/'rows')


def ratings_of_people(folder, score, methods=('truth', 'wav2lip', 'dinet', 'ours'), raters=3, clips=8, where='hd'):
    "What `study collect` makes of made-up raters, whose ratings are `score(method, rater, clip)`."
    folder.mkdir(parents=True); items = {f'c{i:03d}': dict(method=m, clip=f'{where}_{c}', sha256='0'*64) for i, (m, c) in enumerate((m, c) for m in methods for c in range(clips))}
    scales = [dict(name=s.name, label=s.label, question=s.question, answers=list(s.answers), sound=s.sound) for s in SCALES.values()]
    key = dict(format=KEY_FORMAT, methods=list(methods), clips=[f'{where}_{c}' for c in range(clips)], raters=raters, scales=scales, encoded=False, items=items, orders=[list(items)]*raters)
    key['checksum'] = study_checksum(key); key['study'] = key['checksum'][:10]; (folder/'key.json').write_text(json.dumps(key)); files = []
    for r in range(1, raters + 1):
        entries = [dict(item=n, plays=1, failed=False, scores={s: score(i['method'], r, int(i['clip'].split('_')[1])) for s in SCALES}) for n, i in items.items()]
        files.append(folder/f'{r}.json'); files[-1].write_text(json.dumps(dict(format=RATINGS_FORMAT, study=key['study'], checksum=key['checksum'], rater=r, ratings=entries)))
    collect_study(folder, files, folder/'collected')
    return dict(collected=str(folder/'collected'), profile='demo', methods={})


def lines_on_raters(tmp_path, profile='demo', **blocks):
    "The lines of the ledger on raters; rows of the profile say which clips are of which set."
    seen = [rows({'setup_a': {'psnr': 30.}}, clips=8, seeds=1, profile=profile, where=w) for w in ('hd', 'test')]
    for part in seen: part['clip'] = part['set'] + '_' + part['clip'].str.removeprefix('clip_')
    write_rows(tmp_path/profile/'a.csv', pd.concat(seen))
    table = ledger(read_evidence(profile, tmp_path/profile, studies=blocks)).set_index('id')
    return table[table.index.str.startswith('B9.raters') | table.index.str.startswith('C8')]


def test_ratings_of_people_settle_the_claims_on_raters(tmp_path):
    "Three raters, judged both ways; without ratings the claims stay open, in the words that they had."
    order = dict(truth=5, ours=4, dinet=3, wav2lip=2); fair = lambda m, r, c: order[m] - (c == 3) - (m == 'wav2lip' and c == r + 3)
    block = ratings_of_people(tmp_path/'fair', fair); found = lines_on_raters(tmp_path, av_expert=block, g4g=block)
    assert set(found['verdict']) == {'reproduced'} and found.loc['B9.raters', 'measured'] == pytest.approx(2 + 1/8) and found.loc['C8.dinet_realness', 'measured'] == 1
    assert found.loc['B9.raters', 'n'] == 8 and '3 raters' in found.loc['B9.raters', 'why'] and found.loc['B9.raters', 'low'] > 1
    against = lines_on_raters(tmp_path, g4g=ratings_of_people(tmp_path/'against', lambda m, r, c: 5 - fair(m, r, c) + (m == 'truth')))
    assert against.loc['C8', 'verdict'] == 'not_reproduced' and against.loc['B9.raters', 'verdict'] == 'not_run'
    open_ = lines_on_raters(tmp_path, av_expert=dict(collected='', profile='', methods={}))
    assert set(open_['verdict']) == {'not_run'} and all(w.startswith('no ratings were collected') for w in open_['why'])
    assert 'no ratings were collected' in ledger(Evidence('demo')).set_index('id').loc['C8', 'why']
    both = rows({'unsupervised': {'lse_c[corpus]': 4.}, 'wav2lip': {'lse_c[corpus]': 5.}, 'shuffled_audio': {'lse_c[corpus]': 1.}}, clips=8, seeds=1, where='hd')
    both['clip'] = 'hd_' + both['clip'].str.removeprefix('clip_'); write_rows(tmp_path/'both'/'a.csv', both)
    whole = ledger(read_evidence('demo', tmp_path/'both', studies=dict(av_expert=block))).set_index('id').loc['B9']
    assert whole['why'].startswith('one training of each row; reproduced: raters; inconclusive: LSE-C') and (whole['n'], whole['seeds']) == (8, 1)


def test_ratings_that_decide_nothing(tmp_path):
    "Raters who disagree, few raters, few clips, clips of another set or profile, methods by other names."
    prefer = lambda m, r, c: 3 + (m == 'ours'); rule = lines_on_raters
    apart = rule(tmp_path, av_expert=ratings_of_people(tmp_path/'apart', lambda m, r, c: 3 + (m == 'ours')*(r - 2))).loc['B9.raters']
    assert apart['verdict'] == 'inconclusive'
    for name, options in dict(raters=dict(raters=FEWEST_RATERS - 1), clips=dict(clips=FEWEST_CLIPS - 1)).items():
        few = rule(tmp_path, av_expert=ratings_of_people(tmp_path/name, prefer, ('wav2lip', 'ours'), **options)).loc['B9.raters']
        assert few['verdict'] == 'inconclusive' and 'a verdict takes' in few['why']
    block = ratings_of_people(tmp_path/'test', prefer, ('wav2lip', 'unsupervised'), where='test')
    assert 'has no ours, but wav2lip, unsupervised' in rule(tmp_path, av_expert=block).loc['B9.raters', 'why']
    named = block | dict(methods={'ours': 'unsupervised'})
    assert 'nobody rated both on a clip of hd' in rule(tmp_path, av_expert=named).loc['B9.raters', 'why']      # B9 is on hd alone
    assert rule(tmp_path, 'medium', av_expert=named).loc['B9.raters', 'why'] == 'no ratings were collected'


def test_strange_input_is_refused():
    with pytest.raises(InputError, match='one id'): ledger(Evidence('demo'), (LEDGER[0], LEDGER[0]))
    with pytest.raises(InputError, match='unknown verdicts'): verdict_of(['reproduced', 'maybe'])
    with pytest.raises(ParamsError, match='no claim'): Expert('AVSyncNet is prettier').text()


def test_intervals_and_decisions():
    assert decide(float('nan'), 1.)[0] == 'inconclusive' and decide(0., 1.)[0] == 'inconclusive' and decide(1e-9, 1.)[0] == 'reproduced'
    low, high = seed_interval([1., 1., 1.]); assert low == high == 1.
    assert np.isnan(seed_interval([])).all()
