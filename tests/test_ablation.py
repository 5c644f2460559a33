"""Tables of an ablation: paired tests that find what is there and nothing else, seeds, reasons, and files with equal bytes."""
import numpy as np
import pandas as pd
import pytest

from talkingface.ablation import (LEAK, ablation_notes, ablation_summary, ablation_table, as_printed, chosen_metrics, holm, leak_pairs, leak_summary,
                                  neighbours, network_note, pairs_markdown, printed, read_methods, reported_as, restorer_label,
                                  save_ablation, seed_interval, seeds_markdown, signed_rank, told_interval, variance_figure, variance_markdown,
                                  variance_pairs, weights_note)
from talkingface.core import InputError, file_hash, write_json
from talkingface.experiments import PUBLISHED_FIELDS, check_rows, published, summarise, write_rows
from talkingface.metrics.silence import leak_coefficients, leak_sums
from talkingface.metrics.sync import variance


def row(method='a', clip='c00', metric='ssim', value=.5, **more):
    fixed = dict(profile='smoke', set='test', seed=0, n_frames=10, protocol='p', reason='')
    return fixed | dict(method=method, clip=clip, metric=metric, value=value) | more


def measured(method, gain, seeds=3, clips=20, metric='ssim', luck=(0, 0, 0), noise=.01, sets=('test',)):
    "Clips differ much, methods little."
    gen, hard = np.random.default_rng(list(f'{method}{metric}'.encode())), np.random.default_rng(7).normal(size=clips)
    return [row(method, f'c{i:02d}', metric, .5 + .1*hard[i] + gain + luck[s] + noise*gen.normal(), seed=s, set=name)
            for name in sets for s in range(seeds) for i in range(clips)]


@pytest.fixture()
def rows():
    leak = [row(m, 'all', 'lip_leak', v + .01*s, seed=s, protocol=f'x, 95 % over clips [{v - .1:.3g}, {v + .1:.3g}]')
            for m, v in (('a', .4), ('b', .1)) for s in range(3)]
    absent = [row('gone', 'all', m, None, reason='needs some.safetensors') for m in ('ssim', 'lip_leak')]
    return check_rows(measured('a', 0) + measured('b', .02) + measured('same', 0, luck=(.02, -.02, 0)) + leak + absent)


def test_interval_and_means_are_those_of_the_summary(rows):
    ours = ablation_summary(rows); theirs = summarise(rows)
    clipwise = (ours['metric'] == 'ssim') & (ours['method'] != 'gone')
    columns = ['mean', 'low', 'high', 'n', 'given']
    assert np.array_equal(ours.loc[clipwise, columns].astype(float), theirs.loc[clipwise, columns].astype(float))
    line = ours.set_index(['method', 'metric']).loc[('same', 'ssim')]
    assert line['seeds'] == 3 and line['seed_high'] - line['seed_low'] > .03


def test_measures_of_a_set_have_an_interval_over_trainings_or_that_of_the_evaluation(rows):
    lone = ablation_summary(rows[rows['seed'] == 0]).set_index(['method', 'metric']).loc[('a', 'lip_leak')]
    assert (lone['low'], lone['high']) == (.3, .5)
    line = ablation_summary(rows).set_index(['method', 'metric']).loc[('a', 'lip_leak')]
    assert (line['low'], line['high']) == pytest.approx((.41 - .02484, .41 + .02484), abs=1e-4) and np.isnan(line['n']) and line['mean'] == pytest.approx(.41)
    assert told_interval('expert corpus, 95 % over clips [-6.8e-16, 3.4e-16]') == (-6.8e-16, 3.4e-16)
    assert np.isnan(told_interval('expert corpus')).all()


def test_interval_text_is_what_evaluation_writes():
    from talkingface.metrics.report import _told
    text = _told(dict(protocol='p'), (.0123456, 12345.6))['protocol']
    assert told_interval(text) == (.01235, 1.235e4)


def test_holm_is_that_of_the_textbook():
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert np.isnan(holm([np.nan, .5])[0]) and holm([.9, .9]).max() == 1 and len(holm([])) == 0


def test_signed_rank():
    assert signed_rank([1.]*6) == pytest.approx(2/2**6) and signed_rank([0, 0, 0]) == 1 and np.isnan(signed_rank([]))


def test_pairs_find_what_is_there(rows):
    table = neighbours(rows, [('b', 'a'), ('same', 'a'), ('gone', 'a')], ['ssim', 'lip_leak']).set_index(['method', 'metric'])
    found = table.loc[('b', 'ssim')]
    assert found['low'] < .02 < found['high'] and found['p_holm'] < .001 and found['better'] and found['agree'] and found['n'] == 20
    assert len(found['per_seed'].split('; ')) == 3 == found['seeds'] and found['seed_low'] < found['mean'] < found['seed_high']
    assert table.loc[('same', 'ssim'), 'agree'] is False
    assert table.loc[('gone', 'ssim'), 'reason'] == 'gone: needs some.safetensors' and np.isnan(table.loc[('gone', 'ssim'), 'mean'])
    whole = table.loc[('b', 'lip_leak')]
    assert whole['mean'] == pytest.approx(-.3) and np.isnan(whole['p']) and whole['n'] == 0 and whole['over'] == 'trainings'
    assert whole['low'] - 1e-9 <= whole['mean'] <= whole['high'] + 1e-9 and whole['better']
    two = neighbours(rows[rows['seed'] < 2], [('b', 'a')], ['lip_leak']).iloc[0]
    assert two['seeds'] == 2 and np.isnan(two['low']) and two['over'] == '' and two['better'] is None


def test_interval_over_trainings_is_students():
    from scipy.stats import ttest_1samp
    told = ttest_1samp([.1, .4, .2], 0).confidence_interval()
    assert seed_interval([.1, .4, .2]) == pytest.approx((told.low, told.high)) and np.isnan(seed_interval([1, 2])).all()


def test_cells_tell_what_the_heading_does_not():
    each = [row(m, 'all', 'fid_corpus', v + .1*s, seed=s) for m, v in (('a', 4.), ('b', 3.)) for s in range(3)]
    silent = [row(m, 'c00', 'lmd', None, seed=s, reason='silent') for m in 'ab' for s in range(3)]
    scored = [r for m, gain in (('a', 0), ('b', -1e-9)) for r in measured(m, gain, metric='lmd', noise=0) if r['clip'] != 'c00']
    pairs = neighbours(measured('a', 0) + measured('b', .02) + each + silent + scored, [('b', 'a')], ['ssim', 'lmd', 'fid_corpus'])
    text = pairs_markdown(pairs)
    assert 'n = 20 clips**' in text and '(n = 19)' in text and '(3 trainings)' in text and '(n = 20)' not in text
    assert '−1.00e−09' in text and '0.000000' not in text and 'three equal signs happen by chance one time in four' in text
    assert pairs_markdown(pairs, thousandths=['ssim']).count('SSIM[×1000]') == 1
    tiny = neighbours(measured('a', 0, noise=0) + measured('b', 0, noise=0), [('b', 'a')], ['ssim'])
    assert '| 0.000 [0.000, 0.000] |' in pairs_markdown(tiny)


def test_false_alarms_are_rare():
    "Under no difference, Holm leaves about one table in twenty with any bold cell."
    alarms = 0
    for k in range(40):
        gen = np.random.default_rng(k)
        some = [row(m, f'c{i:02d}', metric, gen.normal()) for m in 'ab' for metric in ('ssim', 'lmd', 'psnr', 'lse_d') for i in range(12)]
        alarms += bool((neighbours(some, [('a', 'b')], ['ssim', 'lmd', 'psnr', 'lse_d'])['p_holm'] < .05).any())
    assert alarms <= 7


def test_seeds_that_only_one_has_are_not_compared():
    "An early seed with luck must not stand against a method that was trained once."
    both = measured('a', 0, seeds=3, luck=(0, .5, .5)) + measured('b', 0, seeds=1)
    line = neighbours(both, [('a', 'b')], ['ssim']).iloc[0]
    assert line['seeds'] == 1 and abs(line['mean']) < .02 and line['agree'] is None


def ragged(seeds=6):
    "Rows b and d have six trainings, a has three; the last three of b are far better."
    return measured('a', 0) + measured('b', .02, seeds, luck=(0, 0, 0, .5, .5, .5)) + measured('d', .04, seeds, luck=(0,)*6)


def test_pairs_are_of_the_trainings_that_both_have():
    pairs = neighbours(ragged(), [('b', 'a'), ('d', 'b')], ['ssim']).set_index('method'); text = pairs_markdown(pairs.reset_index())
    assert pairs['seeds'].tolist() == [3, 6] and abs(pairs['mean']['b'] - .02) < .01 and pairs['agree'].tolist() == [True, False]
    for part in ('B − A, 3 trainings', 'D − B, 6 trainings', 'those that both rows have', 'three equal signs happen by chance one time in four, six equal signs happen by chance one time in thirty-two'):
        assert part in text
    even = pairs_markdown(neighbours(measured('a', 0) + measured('b', .02), [('b', 'a')], ['ssim'])); assert '| B − A |' in even
    whole = [r | dict(clip='all', metric='fid_corpus') for r in ragged() if r['clip'] == 'c00']
    line = neighbours(whole, [('b', 'a')], ['fid_corpus']).iloc[0]; assert line['seeds'] == 3 and abs(line['mean'] - .02) < .05 and line['over'] == 'trainings'


def test_tables_tell_which_rows_have_other_numbers_of_trainings(tmp_path):
    table = ablation_table(ragged(), ['a', 'b', 'd'], ['ssim']).set_index('method'); notes = ' '.join(ablation_notes(table.reset_index(), {'a': 'A: one, two'}))
    assert table['seeds'].tolist() == [3, 6, 6] and 'Seeds: 6 of each, but 3 of A: one, two.' in notes
    assert table['ssim']['b'] > .25 + table['ssim']['a']                                    # its own mean, over all six
    assert 'farther apart by chance' in seeds_markdown(table.reset_index()) and 'chance' not in seeds_markdown(table.reset_index().tail(2))
    save_ablation(table.reset_index(), tmp_path/'t', short={'a': 'First'}); assert 'but 3 of First.' in (tmp_path/'t.md').read_text()


def test_variances_and_leaks_are_of_the_trainings_that_both_have():
    calm, wild = scattered('av', .5, 3), scattered('sync', 1, 3) + [r for r in scattered('sync', 4, 6) if r['seed'] > 2]
    found = variance_pairs(calm + wild, [('av', 'sync')]); even = variance_pairs(calm + [r for r in wild if r['seed'] < 3], [('av', 'sync')])
    pd.testing.assert_frame_equal(found, even); assert found['seeds'][0] == 3 and found['ratio'][0] == pytest.approx(.25, abs=.03)
    assert '3 trainings each' in variance_figure(found).axes[0].get_yticklabels()[0].get_text()
    leak = openings('few', .2, 3) + openings('many', .1, 3) + [r for r in openings('many', .6, 6) if r['seed'] > 2]; gap = leak_pairs(pd.DataFrame(leak), [('many', 'few')])
    assert gap['seeds'][0] == 3 and gap['better'][0] and gap['mean'][0] == pytest.approx(-.1, abs=.02) and gap['agree'][0]
    told = leak_summary(pd.DataFrame(leak)).set_index('method'); assert told['seeds'].to_dict() == {'few': 3, 'many': 6} and told['mean']['many'] > .3


def test_reasons_under_a_table_are_one_sentence():
    some = measured('a', 0) + measured('b', .1) + [row('gone', 'all', 'ssim', None, reason='weights file x.pth not found. Get it from somewhere (licence: some)')]
    table = ablation_table(some, ['a', 'b', 'gone'], ['ssim'])
    assert 'Gone (weights file x.pth not found).' in ' '.join(ablation_notes(table)) and 'licence' in table.set_index('method')['reason']['gone']


def test_infinite_and_missing_clips_are_left_out():
    some = measured('a', 0, seeds=1) + measured('b', .1, seeds=1)
    some[0] |= dict(value=None, reason='silent'); some[21] |= dict(value=np.inf, reason='identical')
    assert neighbours(some, [('b', 'a')], ['ssim'])['n'][0] == 18


def test_sets_without_a_row_are_skipped_except_the_first():
    some = measured('a', 0, seeds=1, sets=('test', 'words')) + measured('b', .1, seeds=1)
    table = neighbours(some, [('b', 'a')], ['ssim'], ['test', 'words'])
    assert table['set'].tolist() == ['test']
    assert neighbours(some, [('b', 'a')], ['ssim'], 'words')['reason'][0] == 'b: no rows'


def test_names_stand_for_every_network():
    there = ['lse_c[corpus]', 'lse_c[syncnet_v2]', 'lse_c_variance[corpus]', 'lip_leak', LEAK]
    assert chosen_metrics(['lip_leak', 'lse_c', 'fid'], there) == ['lip_leak', 'lse_c[corpus]', 'lse_c[syncnet_v2]']


def test_rows_of_a_folder(tmp_path, rows):
    write_rows(tmp_path/'baselines.csv', rows[rows['method'].isin(['a', 'same'])]); write_rows(tmp_path/'b.csv', rows[rows['method'] == 'b'])
    assert read_methods(tmp_path, ['b', 'a', 'never']).drop_duplicates('method')['method'].tolist() == ['b', 'a']
    with pytest.raises(InputError, match='none of never'): read_methods(tmp_path/'nowhere', ['never'])
    with pytest.raises(InputError, match='hold none of never'): read_methods(tmp_path, ['never'])


@pytest.fixture()
def told(tmp_path):
    cells = [('ours', 'ssim', .952, 'no'), ('ours', 'ifc', .16, 'no'), ('ours', 'fid', 3.83, 'yes'), ('iplap', 'ssim', .87, 'no')]
    path = tmp_path/'published.csv'
    pd.DataFrame([('x', 'main', r, 'LRS2', m, v, 'note', c) for r, m, v, c in cells], columns=PUBLISHED_FIELDS).to_csv(path, index=False)
    return published(path)


def test_reported_values_stand_beside_the_nearest_metric(told):
    assert reported_as(told, {'ours': ['b', 'c']}, ['ssim', 'fid_corpus'])['row'].tolist() == ['b', 'c', 'b', 'c', 'b', 'c', 'iplap']
    assert set(reported_as(told, {}, ['ssim', 'fid_corpus'])['metric']) == {'ssim', 'ifc', 'fid_corpus'}
    assert set(reported_as(told, {}, ['fid[inception]', 'fid_corpus'])['metric']) == {'ssim', 'ifc', 'fid'}


def test_nothing_is_lost_and_nothing_invented(rows, told):
    table = ablation_table(rows, ['a', 'gone', 'never', 'b', 'iplap'], ['ssim', 'lmd', 'lip_leak'], ['test'], reported_as(told, {'ours': 'b'}, ['ssim']),
                           {'test': 'LRS2'}, {'a': 'base'}).set_index('method')
    assert table.index.tolist() == ['a', 'gone', 'never', 'b', 'iplap']
    assert table['reason'].tolist() == ['', 'needs some.safetensors', 'not part of this profile', '', 'as reported only']
    assert table.loc[['gone', 'never', 'iplap'], ['ssim', 'ssim_low', 'ssim_used', 'lip_leak']].isna().all(axis=None)
    assert (table['ssim_reported']['b'], table['ssim_reported']['iplap'], table['ifc_reported']['b']) == (.952, .87, .16)
    assert (table['about']['a'], table['seeds']['a'], table['ssim_used']['a'], table['ssim_given']['a']) == ('base', 3, 20, 20)
    assert 'lip_leak_used' not in table and 'lmd' not in table
    notes = ' '.join(ablation_notes(table.reset_index()))
    for text in ('Gone (needs some.safetensors)', 'Never (not part of this profile)', 'IFC of B 0.16', 'averaged over seeds', 'Lip leak: one value'):
        assert text in notes
    with pytest.raises(InputError, match='none of the metrics'): ablation_table(rows, ['a'], ['psnr'])


def test_only_strangers_are_not_part_of_the_profile(rows):
    table = ablation_table(rows, ['a', 'gone', 'late', 'never'], ['ssim'], about={'a': '', 'gone': '', 'late': ''}).set_index('method')
    assert table['reason'].tolist() == ['', 'needs some.safetensors', 'no rows; run its stage of evaluation', 'not part of this profile']


def test_published_digits_stay(tmp_path, rows):
    path = tmp_path/'published.csv'; path.write_text(','.join(PUBLISHED_FIELDS) + '\nx,t,a,LRS2,ssim,0.9520,note,no\nx,t,b,LRS2,ssim,7.116,note,yes\nx,t,a,LRS2,ifc,0.20,note,no\n')
    told = reported_as(printed(path, paper='x'), {}, ['ssim']); table = ablation_table(rows, ['a', 'b', 'same'], ['ssim'], reported=told, reported_sets={'test': 'LRS2'})
    save_ablation(table, tmp_path/'t')
    for text in ((tmp_path/'t.md').read_text(), (tmp_path/'t.tex').read_text(), (tmp_path/'t.csv').read_text()): assert '0.9520' in text and '7.116' in text
    assert 'IFC of A 0.20' in (tmp_path/'t.md').read_text() and table['ssim_reported'].astype(float).max() == 7.116
    assert as_printed(table, told, {'test': 'LRS2'})['ssim_reported'].notna().tolist() == [True, True, False]


def test_columns_beside_published_ones_are_not_scaled(tmp_path):
    told = pd.DataFrame([('x', 'main', 'a', 'LRS2', 'ifc_feat_corpus', .04, 'note', True)], columns=PUBLISHED_FIELDS)
    some = [r | dict(metric='ifc_feat_corpus', value=r['value']/100) for r in measured('a', 0) + measured('b', .02)]
    for reported, scaled in ((told, False), (None, True)):
        save_ablation(ablation_table(some, ['a', 'b'], ['ifc_feat_corpus'], reported=reported, reported_sets={'test': 'LRS2'}), tmp_path/'t')
        assert ('×1000' in (tmp_path/'t.md').read_text()) == scaled


@pytest.mark.parametrize('stage', ['table_main', 'table_post_processing'])
def test_others_have_numbers_or_the_name_of_a_file(stage, tmp_path):
    "The stage notebook itself, on rows that two of the others have."
    import json
    from talkingface.core import repository_root
    from talkingface.leaking import LEAK_FIELDS
    names = ['ground_truth', 'final', 'setup_g']; every = [r for m in names for r in measured(m, 0, seeds=1, metric='psnr')]
    others = [r for m in ('wav2lip', 'final_unsharp') for r in measured(m, .1, seeds=1, metric='psnr')]
    others.append(row('final_vqfr', 'all', 'psnr', None, reason='weights file VQFR_v2.pth not found'))
    write_rows(tmp_path/'rows'/'baselines.csv', check_rows(every)); write_rows(tmp_path/'rows'/'others.csv', check_rows(others))
    pd.DataFrame(openings('setup_g', .1, 1) + openings('final', .1, 1))[list(LEAK_FIELDS)].to_csv(tmp_path/'leak.csv', index=False)
    notebook = json.loads((repository_root()/'nbs'/'papers'/'stabilized_sync'/f'{stage}.ipynb').read_text()); room = {}
    given = dict(rows=str(tmp_path/'rows'), leak=str(tmp_path/'leak.csv'), generators=str(tmp_path), out=str(tmp_path/stage), labels={m: {} for m in names[1:]},
                 restored={'wav2lip': {}, 'final_unsharp': {'restorer': 'unsharp'}, 'final_vqfr': {'restorer': 'vqfr_v2'}})
    for cell in [c for c in notebook['cells'] if c['cell_type'] == 'code' and f'_more' not in ''.join(c['source'])]:
        exec(''.join(cell['source']), room)
        if 'parameters' in cell['metadata'].get('tags', []): room |= given
    table = room['table'].set_index('method'); there = [m for m in ('wav2lip', 'final_unsharp') if m in table.index]
    assert 'final_unsharp' in there and ('wav2lip' in there) == (stage == 'table_main')
    assert np.isfinite(table.loc[there, 'psnr']).all() and (table.loc[there, 'reason'] == '').all() and 'VQFR_v2.pth' in table.loc['final_vqfr', 'reason']


def test_clips_that_do_not_count_are_told(rows):
    some = measured('a', 0, seeds=1) + measured('b', 0, seeds=1) + measured('c', 0, seeds=1)
    for r in some:
        if r['clip'] == 'c00' or (r['clip'], r['method']) == ('c01', 'b'): r |= dict(value=None, reason='silent')
    notes = ' '.join(ablation_notes(ablation_table(some, ['a', 'b', 'c'], ['ssim'])))
    assert 'SSIM on 19 of 20 clips of test; SSIM on 18 of 20 clips of test (B)' in notes


def test_files_have_equal_bytes_and_plain_numbers(tmp_path, rows):
    small = check_rows([r | dict(metric='ifc_feat_corpus', value=r['value'] / 100) for r in measured('a', 0) + measured('b', .02)])
    every = check_rows(pd.concat([rows, small])); table = ablation_table(every, ['a', 'gone', 'b'], ['ssim', 'ifc_feat_corpus', 'lip_leak'])
    pairs = neighbours(every, [('b', 'a'), ('gone', 'a')], ['ssim', 'ifc_feat_corpus', 'lip_leak'])
    save = lambda: save_ablation(table, tmp_path/'t', 'Title', 'Profile smoke.', pairs, short={'b': 'Bee'}, more='**More**\n')
    first = {p.name: file_hash(p) for p in save()}
    assert set(first) == {f't{e}' for e in ('.csv', '.md', '.tex', '.pdf', '.png', '_pairs.csv')} and first == {p.name: file_hash(p) for p in save()}
    text = (tmp_path/'t.md').read_text()
    for part in ('IFC feat (corpus)[×1000]', '**More**', '**Neighbouring rows**', '**Seeds**', 'Bee − A', '| not run |', 'Profile smoke.'): assert part in text
    read = pd.read_csv(tmp_path/'t.csv'); assert read['ifc_feat_corpus'].max() < .01
    assert pd.read_csv(tmp_path/'t_pairs.csv')['n'].tolist() == [20, 20, 0, 0, 0, 0]
    lines = text.split('\n'); starts = [i for i, l in enumerate(lines) if l.startswith('|---')]
    for i in starts: assert lines[i - 1].count('|') == lines[i].count('|') == lines[i + 1].count('|')


def test_one_seed_says_so(rows):
    one = rows[rows['seed'] == 0]
    assert 'One training of each' in pairs_markdown(neighbours(one, [('b', 'a')], ['ssim']))
    assert seeds_markdown(ablation_table(one, ['a', 'b'], ['ssim'])) == ''


def scattered(method, width, seeds=2, clips=30):
    hard, gen = np.random.default_rng(1).normal(size=clips), np.random.default_rng(2)
    return [row(method, f'c{i}', 'lse_c[corpus]', 5 + width*hard[i] + .05*gen.normal(), seed=s) for s in range(seeds) for i in range(clips)]


def test_ratio_of_variances():
    found = variance_pairs(scattered('sync', 1) + scattered('av', .5), [('av', 'sync'), ('sync', 'sync'), ('none', 'sync')])
    ours = found.iloc[0]
    assert ours['ratio'] == pytest.approx(.25, abs=.03) and ours['ratio_low'] < ours['ratio'] < ours['ratio_high'] < .5
    by_seed = [variance([r['value'] for r in scattered('av', .5) if r['seed'] == s]) for s in range(2)]
    assert ours['variance'] == pytest.approx(np.mean(by_seed)) and (ours['n'], ours['given'], ours['seeds']) == (30, 30, 2)
    assert found.iloc[1]['ratio'] == found.iloc[1]['ratio_low'] == 1
    assert 'fewer than two clips' in found.iloc[2]['reason'] and 'fewer than two' in variance_markdown(found)
    variance_figure(found, reported=.84); variance_figure(variance_pairs(scattered('sync', 1), [('none', 'sync')]))
    still = variance_figure(found.assign(ratio_low=0., ratio_high=100.), caption='Profile x.').axes[0]
    assert {'<', '>'} <= {line.get_marker() for line in still.lines} and 'n = 30 clips' in still.get_yticklabels()[0].get_text() and still.get_xlabel()


def openings(method, copied, seeds=2, clips=10, frames=40):
    gen, out = np.random.default_rng(3), []
    for s in range(seeds):
        for c in range(clips):
            target, reference = gen.gamma(3, 1.5, (2, frames)); made = .6*target + copied*reference + .5*gen.normal(size=frames)
            out += [dict(profile='smoke', method=method, seed=s, policy='per_frame', clip=f'c{c}', frame=t, generated=made[t], target=target[t], reference=reference[t])
                    for t in range(frames)]
    return out


def test_leak_of_the_intervention():
    leak = pd.DataFrame(openings('random', .4) + openings('closed', .02)); found = leak_summary(leak).set_index('method')
    one = leak[leak['method'] == 'random']; about = ['generated', 'target', 'reference']
    one = one[about] - one.groupby(['clip', 'seed'])[about].transform('mean')          # within clips
    assert found['mean']['random'] == pytest.approx(leak_coefficients(leak_sums(one['generated'], one['target'], one['reference']))[0])
    assert found['low']['random'] < .4 < found['high']['random'] and found['seeds']['random'] == 2 and found['n']['random'] == 10
    gap = leak_pairs(leak, [('closed', 'random'), ('other', 'random')])
    assert gap['mean'][0] == pytest.approx(found['mean']['closed'] - found['mean']['random']) and gap['better'][0] and gap['agree'][0]
    assert gap['low'][0] < -.38 < gap['high'][0] and "'other'" in gap['reason'][1] and gap['reason'][1].startswith('not measured')
    table = ablation_table(measured('random', 0) + measured('closed', 0), ['random', 'closed', 'other'], ['ssim', LEAK], extra=leak_summary(leak))
    assert table[LEAK].notna().tolist() == [True, True, False] and table['seeds'].tolist() == [3, 3, 0]


def test_labels(tmp_path):
    write_json(tmp_path/'a'/'meta.json', {'config': {'name': 'light', 'width': 24}}); write_json(tmp_path/'w'/'meta.json', {'config': {'name': 'wav2lip'}})
    write_json(tmp_path/'b'/'meta.json', {'config': {'name': 'light', 'width': 24}})
    assert network_note(tmp_path, ['a', 'b', 'gone']) == 'light network, width 24'
    assert network_note(tmp_path, ['a', 'b', 'w']) == 'light network, width 24; wav2lip network (w)' and network_note(tmp_path, []) == ''
    write_json(tmp_path/'g'/'meta.json', {'run': {'row': {'losses': {'sync': .1, 'pixel': 2}, 'options': {'pixel': {'mask': 1}}}}})
    assert weights_note(tmp_path, 'g', 'G', {'losses': {'sync': 1., 'pixel': 2.}, 'options': {'pixel': {'mask': 1}}}) == "Weights of G's losses as printed but for sync 0.1 (1)."
    assert weights_note(tmp_path, 'g', 'G', {'losses': {'sync': .1, 'pixel': 2.}}) == "Weights of G's losses as printed; settings of ours: pixel with mask 1."
    assert restorer_label('vqfr_v1') == 'VQFR v1' and restorer_label('unsharp') == 'Unsharp mask'
